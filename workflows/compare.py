#!/usr/bin/env python
"""Compare results: is one better than another, by how much, and on which images?"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import compare

if __name__ == "__main__":
    compare()
