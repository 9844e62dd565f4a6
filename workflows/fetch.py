#!/usr/bin/env python
"""Download PASCAL VOC, SBD and COCO: resumed, checked, safely unpacked into the folders that prepare reads."""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import fetch

if __name__ == "__main__":
    fetch()
