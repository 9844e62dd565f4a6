#!/usr/bin/env python
"""Evaluate a network on a prepared data set: AP^r and mean IoU, a report and an MLflow run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from instseg.config import EvaluateConfig
from instseg.jobs.evaluate import evaluate


def main() -> None:
    """Parse the options and run; a mistake of the user's is one line and exit status 2."""
    config = tyro.cli(EvaluateConfig, description=__doc__)
    try:
        evaluate(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
