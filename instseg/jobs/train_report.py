"""What training workers leave: records for the driver, checkpoints, and a step that failed."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train

from instseg.data.files import read_json, write_json
from instseg.jobs.train_worker import Worker
from instseg.jobs.validations import kept
from instseg.models.checkpoint import (
    FOLDER,
    epoch_folder,
    prune_checkpoints,
    publish_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from instseg.storage import StoragePath
from instseg.training.optimizer import optimizer_tensors

WAIT = "data_wait_ms"
FAILED, _BATCH = "failed_step", "failed_step.json"
_STEPS_PER_POINT = 10  # of the curves in MLflow
# A checkpoint has as many records as the driver may not have logged when it dies: one that waits in Ray Train's
# queue, which holds one, one that waits for its place there, and one that is being logged.
_NUM_RECORDS = 3


class FailedStep(Exception):  # noqa: N818
    """A loss or the gradient is not finite; the network is as it was before the step.

    Args:
        losses: Of the images of all workers, with their ids.
        gradient_norm: Of all parameters together.
    """

    def __init__(self, losses: list[tuple[str, float]], gradient_norm: float) -> None:
        super().__init__(losses, gradient_norm)
        self.losses = losses
        self.gradient_norm = gradient_norm


def add_record(worker: Worker, curves: dict[str, list[float]], seconds: float) -> None:
    """Add to the progress what the driver logs of the steps since the last report; at an epoch's end, also of it.

    Args:
        worker: After these steps.
        curves: Each quantity at each of these steps, the mean over all workers.
        seconds: How long they took.
    """
    progress, num_steps = worker.progress, len(curves[WAIT])
    first, spans = progress.step - num_steps, range(0, num_steps, _STEPS_PER_POINT)
    progress.epoch_steps += num_steps
    progress.epoch_seconds += seconds
    progress.epoch_sums = {name: progress.epoch_sums.get(name, 0.0) + sum(curve) for name, curve in curves.items()}
    record = {
        "step": progress.step,
        "time_ms": int(time.time() * 1000),
        "points": [
            [
                first + min(begin + _STEPS_PER_POINT, num_steps),
                {name: _mean(curve[begin : begin + _STEPS_PER_POINT]) for name, curve in curves.items()},
            ]
            for begin in spans
        ],
    }
    if progress.images >= len(worker.dataset):
        record |= _end_epoch(worker)
    progress.records = [*progress.records, record][-_NUM_RECORDS:]


def _end_epoch(worker: Worker) -> dict[str, Any]:
    """Count the epoch as finished; what the driver logs and prints of it."""
    progress = worker.progress
    progress.epoch += 1
    means = {name: total / progress.epoch_steps for name, total in progress.epoch_sums.items()}
    record = {
        "epoch": progress.epoch,
        "losses": {name: mean for name, mean in means.items() if name.endswith("_loss")},
        "images_per_second": progress.images / progress.epoch_seconds,
        WAIT: means[WAIT],
    }
    progress.images, progress.epoch_steps, progress.epoch_seconds, progress.epoch_sums = 0, 0, 0.0, {}
    return record


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report(worker: Worker) -> None:
    """Report the progress, by rank 0 with a checkpoint, which is uploaded while training goes on."""
    checkpoint = None
    if worker.rank == 0:
        folder = tempfile.mkdtemp()  # Ray deletes it
        write_checkpoint(Path(folder), **_contents(worker))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    run, progress, config = StoragePath.of(worker.config.out), worker.progress, worker.config
    keep, validation = config.keep_checkpoints, config.validation

    def upload(local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """In place of Ray's own copy, which gives the manifest no last place."""
        publish_checkpoint(Path(local.path), run / FOLDER / name)
        prune_checkpoints(run, keep, kept(run, validation))
        filesystem, path = (run / FOLDER / name).filesystem
        return ray.train.Checkpoint(path, filesystem)

    ray.train.report(
        {"records": progress.records},
        checkpoint,
        checkpoint_dir_name=epoch_folder(run, progress.epoch, progress.images).name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        checkpoint_upload_fn=upload,
    )


def _contents(worker: Worker) -> dict[str, Any]:
    """Of a checkpoint, as `write_checkpoint` takes it."""
    return {
        "model": worker.network.state_dict(),
        "config": worker.settings,
        "optimizer": optimizer_tensors(worker.optimizer, worker.network),
        "state": asdict(worker.progress),
    }


def delete_failed_step(run: StoragePath) -> None:
    """Forget the failed step of an earlier attempt."""
    (run / FAILED).delete_folder()


def save_failed_step(worker: Worker, failed: FailedStep) -> None:
    """Leave in the run directory a checkpoint of what there was before the step, and the images of the step.

    It lies beside the run's checkpoints: another run may start from it, and this one resumes from an earlier one.
    """
    folder = StoragePath.of(worker.config.out) / FAILED
    save_checkpoint(folder, **_contents(worker))
    numbers = {"epoch": worker.progress.epoch + 1, "step": worker.progress.step + 1}
    losses = [[image_id, str(loss)] for image_id, loss in failed.losses]  # JSON has no NaN
    write_json(folder / _BATCH, {**numbers, "losses": losses, "gradient_norm": str(failed.gradient_norm)})


def raise_failed_step(run: StoragePath) -> None:
    """Raise FloatingPointError if the workers left a failed step, naming its images and where it lies."""
    if (run / FAILED / _BATCH).size() is None:
        return
    found = read_json(run / FAILED / _BATCH)
    bad = [f"loss of {image_id} is {loss}" for image_id, loss in found["losses"] if not math.isfinite(float(loss))]
    ids = ", ".join(image_id for image_id, _ in found["losses"])
    what = ", ".join(bad) or f"norm of the gradient is {found['gradient_norm']} with {ids}"
    raise FloatingPointError(
        f"{what} in step {found['step']}, epoch {found['epoch']}; lower the learning rates. {run / FAILED} has the "
        "images of the step and the checkpoint before it, which another run can --start-from"
    )
