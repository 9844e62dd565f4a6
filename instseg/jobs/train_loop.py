"""What each training worker does: one image a step, gradients averaged over the workers, a checkpoint per epoch."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.data.folds import training_images
from instseg.jobs.run_log import EpochLog, RunLog
from instseg.models.checkpoint import (
    FOLDER,
    Checkpoint,
    epoch_folder,
    latest_checkpoint,
    prune_checkpoints,
    publish_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from instseg.models.network import InstanceNetwork
from instseg.report.provenance import origin
from instseg.storage import StoragePath
from instseg.structures import Sample
from instseg.training.objective import Objective
from instseg.training.optimizer import (
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    take_step,
)

_STEPS_PER_POINT = 10  # of the curves in MLflow
# A checkpoint has the records of as many epochs as the driver may not have logged when it dies: one that waits in
# Ray Train's queue, which holds one, one that waits for its place there, and one that is being logged.
_NUM_RECORDS = 3
_WAIT = "data_wait_ms"


@dataclass(frozen=True)
class Loop:
    """What the driver hands to each worker.

    Attributes:
        config: The run; paths absolute.
        settings: `training_settings`, of which each checkpoint has a copy.
        log: For lines that the driver prints.
    """

    config: TrainConfig
    settings: dict[str, Any]
    log: RunLog


@dataclass
class _Worker:
    """A worker's state between epochs."""

    config: TrainConfig
    settings: dict[str, Any]
    log: RunLog
    dataset: PreparedDataset
    network: InstanceNetwork
    objective: nn.Module  # `Objective`, wrapped by DDP where there is more than one worker
    optimizer: torch.optim.Adam
    rank: int
    num_workers: int
    step: int  # steps that were taken by all of this run's workers, however many they were
    records: list[dict[str, Any]]  # of the latest epochs

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.dataset) / self.num_workers)


def train_loop(loop_config: dict[str, Loop]) -> None:
    """Train from the latest checkpoint of the run directory, or from the start (the function that Ray Train runs).

    Args:
        loop_config: The one entry "loop".
    """
    loop = loop_config["loop"]
    config = loop.config
    torch.set_num_threads(config.cpus_per_worker)
    checkpoint = _agree_on_checkpoint(StoragePath.of(config.out))
    worker = _build(loop, checkpoint)
    for epoch in range(checkpoint.state["epoch"] if checkpoint else 0, config.num_epochs):
        start = time.monotonic()
        curves = _mean_over_workers(list(_train_epoch(worker, epoch)), worker)
        worker.step += worker.steps_per_epoch
        worker.records = [*worker.records, _record(worker, epoch, curves, time.monotonic() - start)][-_NUM_RECORDS:]
        _report(worker, epoch + 1)


def _agree_on_checkpoint(run: StoragePath) -> Checkpoint | None:
    """The newest complete checkpoint as rank 0 finds it, so that all workers start from the same.

    Not what Ray Train remembers as reported: a worker that died after it had saved left a newer one, and what was
    reported may be damaged by now.
    """
    if ray.train.get_context().get_world_rank() > 0:
        folder = ray.train.collective.broadcast_from_rank_zero(None)
        return read_checkpoint(folder) if folder else None
    checkpoint = latest_checkpoint(run)
    ray.train.collective.broadcast_from_rank_zero(str(checkpoint.folder) if checkpoint else None)
    return checkpoint


def training_settings(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint records of its origin, as JSON values."""
    return {
        "model": asdict(config.model),
        "num_labels": dataset.num_labels,
        "classes": list(dataset.classes),
        "data_digest": dataset.digest,
        "train": {name: value for name, value in asdict(config).items() if name not in ("model", "tracking")},
        "provenance": origin(),
    }


def _build(loop: Loop, checkpoint: Checkpoint | None) -> _Worker:
    config = loop.config
    dataset = training_images(config)
    torch.manual_seed(config.seed)
    model = replace(config.model, semantic_weights=None) if checkpoint else config.model
    network = InstanceNetwork(model, dataset.num_labels).train()
    if checkpoint:
        network.restore(checkpoint)
    objective = ray.train.torch.prepare_model(
        Objective(network, config),
        # Left to itself, Ray takes the first GPU that it sees, reserved or not.
        move_to_device=torch.device("cpu") if config.device == "cpu" else True,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},
    )
    optimizer = build_optimizer(network, config)
    if checkpoint:
        restore_optimizer(optimizer, network, checkpoint)
    context = ray.train.get_context()
    state = checkpoint.state if checkpoint else {}
    return _Worker(
        **vars(loop),
        dataset=dataset,
        network=network,
        objective=objective,
        optimizer=optimizer,
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        step=state.get("step", 0),
        records=state.get("records", []),
    )


def _train_epoch(worker: _Worker, epoch: int) -> Iterator[dict[str, float]]:
    """Train on every image once; the losses of each step by name, and the milliseconds that it waited for its image."""
    config = worker.config
    head_only = epoch < config.num_head_epochs
    log = EpochLog(worker.log, epoch, config.num_epochs, worker.steps_per_epoch, worker.num_workers)
    for index, (sample, wait_ms) in enumerate(_samples(worker, epoch)):
        step = epoch * worker.steps_per_epoch + index
        # Dropout depends on the step alone, so that a resumed run repeats an uninterrupted one bit by bit.
        torch.manual_seed(hash((config.seed, step, worker.rank)) % 2**63)
        set_learning_rate(worker.optimizer, config, step, worker.steps_per_epoch)
        worker.optimizer.zero_grad(set_to_none=True)
        total, losses = worker.objective(sample, head_only)
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss is {total.item()} at {sample.image_id}; lower the learning rates")
        total.backward()
        take_step(worker.optimizer)
        values = {name: loss.item() for name, loss in losses.items()}
        if worker.rank == 0:
            log.add(index, values, wait_ms)
        yield {**values, _WAIT: wait_ms}


def _mean_over_workers(losses: list[dict[str, float]], worker: _Worker) -> dict[str, list[float]]:
    """Each loss of each step; all workers take equally many, and have the same losses."""
    sums = torch.tensor([list(step.values()) for step in losses], dtype=torch.float64)  # (steps, losses)
    if worker.num_workers > 1:
        sums = sums.to(next(worker.network.parameters()).device)
        torch.distributed.all_reduce(sums)
    return dict(zip(losses[0], (sums / worker.num_workers).T.tolist(), strict=True))


def _record(worker: _Worker, epoch: int, curves: dict[str, list[float]], seconds: float) -> dict[str, Any]:
    """What the driver logs of an epoch that was just finished, as JSON values."""
    num_steps = worker.steps_per_epoch
    first = worker.step - num_steps
    spans = [(begin, min(begin + _STEPS_PER_POINT, num_steps)) for begin in range(0, num_steps, _STEPS_PER_POINT)]
    means = {name: _mean(curve) for name, curve in curves.items()}
    return {
        "epoch": epoch + 1,
        "step": worker.step,
        "time_ms": int(time.time() * 1000),
        "points": [
            [first + end, {name: _mean(curve[begin:end]) for name, curve in curves.items()}] for begin, end in spans
        ],
        "losses": {name: mean for name, mean in means.items() if name != _WAIT},
        "images_per_second": num_steps * worker.num_workers / seconds,
        _WAIT: means[_WAIT],
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _samples(worker: _Worker, epoch: int) -> Iterator[tuple[Sample, float]]:
    """This worker's share of the images, in an order of its own for each epoch, and how long each was waited for."""
    # Not Ray Data's streaming_split: it drops the remainder, and its order is not reproducible. The sampler repeats
    # up to num_workers - 1 images so that all ranks take equally many steps. Decoding takes 1 % of a step on a CPU,
    # too little to share with another process.
    sampler = DistributedSampler(
        worker.dataset,  # pyright: ignore[reportArgumentType]
        worker.num_workers,
        worker.rank,
        shuffle=True,
        seed=worker.config.seed,
    )
    sampler.set_epoch(epoch)
    samples, start = read_ahead(worker.dataset, list(sampler)), time.monotonic()
    for sample in samples:
        yield sample, 1000 * (time.monotonic() - start)
        start = time.monotonic()


def _report(worker: _Worker, epoch: int) -> None:
    """Report the finished epoch, by rank 0 with a checkpoint, which is uploaded while training goes on."""
    checkpoint = None
    if worker.rank == 0:
        folder = tempfile.mkdtemp()  # Ray deletes it
        state = {"epoch": epoch, "step": worker.step, "records": worker.records}
        tensors = worker.network.state_dict(), optimizer_tensors(worker.optimizer, worker.network)
        write_checkpoint(Path(folder), tensors[0], worker.settings, tensors[1], state)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    run, keep = StoragePath.of(worker.config.out), worker.config.keep_checkpoints

    def upload(local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """In place of Ray's own copy, which gives the manifest no last place."""
        publish_checkpoint(Path(local.path), run / FOLDER / name)
        prune_checkpoints(run, keep)
        filesystem, path = (run / FOLDER / name).filesystem
        return ray.train.Checkpoint(path, filesystem)

    ray.train.report(
        {"records": worker.records},
        checkpoint,
        checkpoint_dir_name=epoch_folder(run, epoch).name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        checkpoint_upload_fn=upload,
    )
