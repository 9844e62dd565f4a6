"""Hashes of files, and JSON that tells when it was damaged."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from instseg.storage import Place, StoragePath

_SEAL = "sha256_of_the_rest"
_CHUNK = 1 << 24


def sha256_of(place: Place) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    sha256 = hashlib.sha256()
    with StoragePath.of(place).open() as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def digest(value: object) -> str:
    """SHA-256 of a value's JSON text, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(place: Place, record: dict[str, Any]) -> None:
    """Write a record of JSON values and its digest."""
    text = json.dumps(record | {_SEAL: digest(record)}, indent=1) + "\n"
    StoragePath.of(place).publish(text.encode())


def read_json(place: Place) -> dict[str, Any]:
    """The record that `write_json` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a value in it is not what was written.
    """
    content = StoragePath.of(place).read_bytes()
    try:
        record = json.loads(content)
        intact = record.pop(_SEAL) == digest(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, record = False, {}
    if not intact:
        raise ValueError(f"{place}: damaged")
    return record
