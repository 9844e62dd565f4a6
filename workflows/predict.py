#!/usr/bin/env python
"""Segment photographs, or a prepared data set: masks as PNGs and COCO results."""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import predict

if __name__ == "__main__":
    predict()
