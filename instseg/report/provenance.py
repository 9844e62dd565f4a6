"""Where numbers come from."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(config: dict[str, Any], data_digest: str) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers: commit, data, versions, machine, configuration."""
    return origin() | {"data_digest": data_digest, "config": config}


def origin() -> dict[str, Any]:
    """Commit, versions and machine."""
    packages = ("numpy", "torch", "ray", "mlflow")
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": platform.platform(),
    }


def commit() -> str | None:
    """The commit of the code, as git describes it: "-dirty" at the end if files differ; None if nothing tells.

    INSTSEG_COMMIT goes before the repository: who submits a job sets it, since `.git` does not travel with the code. It
    is recorded as it was given, in one line.
    """
    if given := " ".join(os.environ.get("INSTSEG_COMMIT", "").split()):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as text by name, those of a part of the configuration after its name and a dot."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat
