#!/usr/bin/env python
"""Prepare a data directory: images, ground truth, logits and detections with foregrounds, as Parquet shards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from instseg.config import PrepareConfig
from instseg.jobs.prepare import prepare


def main() -> None:
    """Parse the options and run; a mistake of the user's is one line and exit status 2."""
    config = tyro.cli(PrepareConfig, description=__doc__)
    try:
        prepare(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
