#!/usr/bin/env python
"""Evaluate a network on a prepared data set: AP^r and mean IoU, a report and an MLflow run."""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import evaluate

if __name__ == "__main__":
    evaluate()
