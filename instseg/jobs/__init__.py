"""Whole runs, one file a workflow. Ray and MLflow are imported here and nowhere else."""
