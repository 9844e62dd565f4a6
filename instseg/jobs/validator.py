"""Validation beside training: an actor that measures checkpoints while the workers go on.

Not Ray Train's own `validation_fn`: what it has yet to do and what it found is in the snapshot of its checkpoint
manager, which refuses to start after a crash and is deleted here; its tasks take a CPU, which waits for ever where
the workers have all; and a task whose process is killed ends the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from instseg.config import ValidationConfig
from instseg.jobs.run_log import RunLog
from instseg.jobs.tracking import Tracker
from instseg.jobs.validate import validation_images
from instseg.jobs.validations import PICTURES, VALIDATIONS, catch_up, records
from instseg.storage import Place, StoragePath

MAX_RESTARTS = 3  # of an actor whose process dies


class Validator:
    """The way to the actor; may be sent to other processes. `validating` makes it."""

    def __init__(self, actor: Any, log: RunLog) -> None:
        self._actor, self._log = actor, log

    def catch_up(self) -> Any:
        """Tell it that there are new checkpoints, and do not wait; returns a reference to wait for."""
        return None if self._actor is None else self._actor.catch_up.remote(self._log)


@contextmanager
def validating(run: Place, config: ValidationConfig, log: RunLog) -> Iterator[Validator]:
    """Validate what the run directory holds and what it gets during the context; wait for the last at its end.

    Takes no CPU of the cluster's, so that it runs beside workers that have them all. What goes wrong is a line of the
    log, and no end to the training.
    """
    if config.data is None:
        yield Validator(None, log)
        return
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
    actor: Any = ray.remote(**options)(_Validator).remote(str(StoragePath.of(run)), config)
    validator = Validator(actor, log)
    try:
        validator.catch_up()
        yield validator
        _wait(validator, log)
    finally:
        ray.kill(actor)


def _wait(validator: Validator, log: RunLog) -> None:
    try:
        ray.get(validator.catch_up())
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        log.line(f"validation ended early; training with the same --out goes on with it: {reason}")


class _Validator:
    """The actor. The log, which is one too, is none of its arguments: Ray warns that they may not outlive a restart."""

    def __init__(self, run: str, config: ValidationConfig) -> None:
        self._arguments = run, config

    def catch_up(self, log: RunLog) -> None:
        for record in catch_up(*self._arguments):
            log.line(in_words(record))


def log_validations(tracker: Tracker, run: Place, logged: set[str]) -> None:
    """Record in MLflow what was found and is not in `logged` yet, and add it there. Once more changes nothing."""
    root = StoragePath.of(run)
    for record in records(root):
        name = record["checkpoint"]
        if name in logged:
            continue
        logged.add(name)
        metrics = {f"validation/{metric}": value for metric, value in record["metrics"].items()}
        tracker.log_metrics(metrics, record["step"], record["time_ms"])
        for picture in PICTURES:
            place = root / VALIDATIONS / f"{name}_{picture}.png"
            if place.size() is not None:
                tracker.log_image(place, picture, record["step"], record["time_ms"])


def log_validation_data(tracker: Tracker, config: ValidationConfig) -> None:
    """Record in MLflow which data validates, if any."""
    if config.data is not None:
        dataset = validation_images(config)
        tracker.log_input("validation", config.data, dataset.digest, len(dataset), "validation")


def in_words(record: dict[str, Any]) -> str:
    """A line of the log."""
    if "error" in record:
        return f"validation of {record['checkpoint']} failed: {record['error']}"
    shown = {"AP^r_vol": "ap_r_vol", "mean IoU": "mean_iou", "ECE": "ece"}
    values = [f"{words} {record['metrics'][name]:.1f} %" for words, name in shown.items() if name in record["metrics"]]
    return (
        f"validation of {record['checkpoint']}, step {record['step']}: {', '.join(values)}, {record['seconds']:.0f} s"
    )
