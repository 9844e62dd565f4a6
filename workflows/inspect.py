#!/usr/bin/env python
"""Look at a prepared data directory: what is in it, and a contact sheet of random images."""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import inspect

if __name__ == "__main__":
    inspect()
