#!/usr/bin/env python
"""Prepared data in, checkpoints and an MLflow run out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import train

if __name__ == "__main__":
    train()
