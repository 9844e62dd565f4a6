#!/usr/bin/env python
"""Evaluate the rows of the paper's Table 1, and two simpler methods, side by side."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from instseg.config import AblateConfig
from instseg.jobs.ablate import ablate


def main() -> None:
    """Parse the options and run; a mistake of the user's is one line and exit status 2."""
    config = tyro.cli(AblateConfig, description=__doc__)
    try:
        ablate(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
