#!/usr/bin/env python
"""The whole system on a generated data set, in minutes on two cores: prepare, train, evaluate, ablate."""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import demo

if __name__ == "__main__":
    demo()
