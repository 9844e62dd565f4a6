#!/usr/bin/env python
"""Prepared data in, checkpoints and an MLflow run out."""

import sys
from pathlib import Path

# Runs without installing the package, and without this folder, whose inspect.py would hide the standard library's.
sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from instseg.jobs.command_line import train

if __name__ == "__main__":
    train()
