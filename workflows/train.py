#!/usr/bin/env python
"""Prepared data in, checkpoints and an MLflow run out."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from instseg.config import TrainConfig
from instseg.recipes import RECIPES, find_recipe


def main() -> None:
    """Parse the command line and train."""
    names = "; ".join(f"{recipe.__name__}: {recipe.__doc__}" for recipe in RECIPES)
    # The recipe decides what the other options default to, so it is read before them.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=RECIPES[0].__name__)
    chosen, rest = parser.parse_known_args()
    recipe = find_recipe(chosen.recipe)
    description = f"Train. --recipe NAME (default {RECIPES[0].__name__}) sets the defaults below. {names}"
    default = recipe(tyro.MISSING, tyro.MISSING)
    config = tyro.cli(TrainConfig, default=default, description=description, args=rest)

    from instseg.jobs.train import train

    train(config)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
