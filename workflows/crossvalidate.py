#!/usr/bin/env python
"""Train once for each fold of a data set, without it, and evaluate all held-out images together."""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import crossvalidate

if __name__ == "__main__":
    crossvalidate()
