"""The last lines of every command: where its results are, and which command comes next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from instseg.storage import Place, StoragePath


def end(out: Place, files: Sequence[str] = (), following: Sequence[str] = (), mlflow: str | None = None) -> None:
    """Print them.

    Args:
        out: Where the results are.
        files: In `out`, those that a person looks at; default: `out` itself.
        following: Commands, of `command`.
        mlflow: How to open it, if it has recorded the run.
    """
    root = StoragePath.of(out)
    print(f"\nresults: {' '.join(shlex.quote(str(root / file)) for file in files) or shlex.quote(str(root))}")
    if mlflow is not None:
        print(f"MLflow:  {mlflow}")
    for line in following:
        print(f"next:    {line}", flush=True)


def command(name: str, *arguments: str, **options: Place | None) -> str:
    """How to type a workflow, with what is to be filled in as FOLDER; options that are None are left out."""
    given = {option.replace("_", "-"): value for option, value in options.items() if value is not None}
    typed = [*arguments, *(word for option, value in given.items() for word in (f"--{option}", str(value)))]
    return shlex.join([f"workflows/{name}.py", *typed])
