#!/usr/bin/env python
"""Download PASCAL VOC, SBD and COCO: resumed, checked, safely unpacked into the folders that prepare reads."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the package

from instseg.jobs.command_line import fetch

if __name__ == "__main__":
    fetch()
