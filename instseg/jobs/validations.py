"""Which checkpoints of a run have been validated, which is the best, which may not go, and whether to stop.

All of it follows from files in the run directory: `validation/<checkpoint>.json` and the pictures beside it, the JSON
last. A validation that was killed is done anew, one that has its JSON is not, so neither kills nor resumed runs change
what is found.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any

from instseg.config import ValidationConfig
from instseg.jobs.validate import validate
from instseg.models.checkpoint import FOLDER, checkpoint_steps
from instseg.storage import Place, StoragePath

VALIDATIONS = "validation"  # folder in the run directory
BEST = "best.json"  # in the run directory: the best checkpoint and what it scored
PICTURES = ("panels", "crf_parameters")


def catch_up(run: Place, config: ValidationConfig) -> Iterator[dict[str, Any]]:
    """Validate every checkpoint that is due, the oldest first; yields the record of each once it is published."""
    root = StoragePath.of(run)
    while waiting := due(root, config):
        name, step = next(iter(waiting.items()))
        record = _record(root, name, step, config)
        winner = best([*records(root), record], config.metric)
        if winner is not None:  # before the record: who is killed in between does both again
            content = {key: winner[key] for key in ("checkpoint", "step", "metrics")} | {"metric": config.metric}
            (root / BEST).publish(_json(content))
        (root / VALIDATIONS / f"{name}.json").publish(_json(record))
        yield record


def _record(run: StoragePath, name: str, step: int, config: ValidationConfig) -> dict[str, Any]:
    began = time.monotonic()
    try:
        panels, parameters = (run / VALIDATIONS / f"{name}_{picture}.png" for picture in PICTURES)
        metrics = validate(run / FOLDER / name, config, panels, parameters)
        found: dict[str, Any] = {"metrics": {key: value for key, value in metrics.items() if not math.isnan(value)}}
    except (ValueError, FileNotFoundError) as error:  # would be so again
        found = {"metrics": {}, "error": str(error)}
    return {
        "checkpoint": name,
        "step": step,
        "time_ms": int(time.time() * 1000),
        "seconds": time.monotonic() - began,
        **found,
    }


def records(run: Place) -> list[dict[str, Any]]:
    """What was found about each validated checkpoint, the oldest first."""
    folder = StoragePath.of(run) / VALIDATIONS
    names = [name for name in folder.files() if name.endswith(".json")]
    return sorted((json.loads((folder / name).read_bytes()) for name in names), key=lambda record: record["step"])


def due(run: Place, config: ValidationConfig) -> dict[str, int]:
    """Names and steps of the checkpoints to validate, the oldest first: each `every` steps after another, or more.

    Counted from the latest that has a record on.
    """
    if config.data is None:
        return {}
    root = StoragePath.of(run)
    latest = max((record["step"] for record in records(root)), default=0)
    found = {}
    for name, step in checkpoint_steps(root).items():
        if step - latest >= config.every:
            found[name] = latest = step
    return found


def best(found: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The record with the highest metric, the earliest of equals; None if no record has one."""
    known = [record for record in found if metric in record["metrics"]]
    return max(known, key=lambda record: record["metrics"][metric], default=None)


def kept(run: Place, config: ValidationConfig) -> set[str]:
    """Names of checkpoints that may not be deleted: the best, and those that wait to be validated."""
    waiting, winner = due(run, config), best(records(run), config.metric)  # in this order: a record comes after BEST
    return {*waiting} | ({winner["checkpoint"]} if winner else set())


def stopped(run: Place, config: ValidationConfig) -> bool:
    """Whether the latest `patience` validations were no better than the best before them."""
    found = records(run)
    winner = best(found, config.metric)
    if config.patience is None or winner is None:
        return False
    return len(found) - 1 - found.index(winner) >= config.patience


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
