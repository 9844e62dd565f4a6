"""What training minimises. Pure torch."""
