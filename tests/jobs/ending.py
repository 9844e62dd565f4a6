"""What every command ends with, for the tests: results that exist, and commands that can be typed."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from instseg.jobs import command_line

REPOSITORY = Path(__file__).resolve().parents[2]


def parsed(line: str) -> Any:
    """What a workflow takes from a command line, of which the rest is not done."""
    script, *arguments = shlex.split(line)
    name, taken = Path(script).stem, []
    assert (REPOSITORY / script).is_file()
    with (
        patch.object(import_module(f"instseg.jobs.{name}"), name, taken.append),
        patch("sys.argv", [script, *arguments]),
    ):
        getattr(command_line, name)()
    return taken[0]


def check_ending(said: str) -> tuple[list[Path], list[Any]]:
    """The places and the commands of the last lines, after checks of both."""
    block = said.rstrip("\n").rpartition("\n\n")[2].splitlines()
    head, *following = (line for line in block if not line.startswith("MLflow:  "))
    places = [Path(place) for place in shlex.split(head.removeprefix("results: "))]
    assert head.startswith("results: ")
    assert all(place.exists() for place in places)
    assert following
    assert all(line.startswith("next:    workflows/") for line in following)
    return places, [parsed(line.removeprefix("next:    ")) for line in following]
