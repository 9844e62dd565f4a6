"""Files that appear whole or not at all, their hashes, and JSON that tells when it was damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SEAL = "sha256_of_the_rest"


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` at the end: readers find all of it or nothing.

    Raises:
        OSError: If it cannot be written, such as on a full disk; names the folder.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, reason, str(path.parent)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """SHA-256 of a value's JSON text, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record of JSON values and its digest."""
    with published(path) as temporary:
        temporary.write_text(json.dumps(record | {_SEAL: digest(record)}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The record that `write_json` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a value in it is not what was written.
    """
    try:
        record = json.loads(path.read_bytes())
        intact = record.pop(_SEAL) == digest(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, record = False, {}
    if not intact:
        raise ValueError(f"{path}: damaged")
    return record
