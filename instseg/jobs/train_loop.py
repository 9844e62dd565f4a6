"""What each training worker does: one image a step, gradients averaged over the workers, a checkpoint per epoch."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import training_images
from instseg.evaluation.matching import match_boxes
from instseg.jobs.run_log import EpochLog
from instseg.models.checkpoint import (
    FOLDER,
    Checkpoint,
    epoch_folder,
    latest_checkpoint,
    save_checkpoint,
)
from instseg.models.network import InstanceNetwork
from instseg.structures import Sample
from instseg.training.detection_loss import detection_loss, jitter_boxes
from instseg.training.losses import instance_loss, semantic_loss
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


class Objective(nn.Module):
    """The losses of one sample. This is what DDP wraps, so that forward and loss are one graph to it.

    Args:
        network: The network to train.
        config: Weights of the losses.
    """

    def __init__(self, network: InstanceNetwork, config: TrainConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, sample: Sample, head_only: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and the losses that it is made of by name, scalars.

        Args:
            sample: With ground truth.
            head_only: Leave the CRFs out: they take most of the time, and the detection head needs many epochs.
        """
        losses = self._head_loss(sample) if head_only else self._losses(sample)
        weights = {"semantic_loss": self.config.semantic_loss_weight, "instance_loss": self.config.instance_loss_weight}
        total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        # What an ablation or the first epochs leave out is not in the graph; DDP waits for every parameter's gradient.
        # A semantic network is in it after them, and too large to be summed at each step for nothing.
        network = self.network
        absent = network.parameters() if head_only else (*network.crf_parameters(), *network.head_parameters())
        return total + 0 * torch.stack([p.sum() for p in absent]).sum(), losses

    def _head_loss(self, sample: Sample) -> dict[str, Tensor]:
        with torch.no_grad():  # the semantic network's rate is 0 in these epochs
            logits = self.network.semantic_logits(sample)
        matches = _matches(sample)
        jittered = replace(sample, detections=jitter_boxes(sample.detections, *sample.image.shape[:2]))
        seen = self.network.see_detections(jittered, logits, matches >= 0)
        return {"detection_loss": detection_loss(seen, jittered.detections, matches, sample.known_instances)}

    def _losses(self, sample: Sample) -> dict[str, Tensor]:
        config, output = self.config, self.network(sample, self.config.ablation)
        labels, truth = sample.detections.labels, (sample.known_instances, sample.instance_labels)
        floor = config.probability_floor
        losses = {
            "semantic_loss": semantic_loss(output.log_q, sample.semantic, floor),
            "instance_loss": instance_loss(output.instance_log_q, labels, *truth, config.instance_loss, floor),
        }
        if (seen := output.detections.seen) is not None:
            losses["detection_loss"] = detection_loss(seen, sample.detections, _matches(sample), truth[0])
        return losses


def _matches(sample: Sample) -> np.ndarray:
    """(D,) index of the instance that each detection has found, or -1."""
    if (truth := sample.known_instances) is None:
        return np.full(len(sample.detections), -1)
    return match_boxes(sample.detections, truth, sample.instance_labels)


@dataclass
class _Worker:
    """A worker's state between epochs."""

    config: TrainConfig
    dataset: PreparedDataset
    network: InstanceNetwork
    objective: nn.Module  # `Objective`, wrapped by DDP where there is more than one worker
    optimizer: torch.optim.Adam
    rank: int
    num_workers: int
    records: list[dict[str, Any]]  # of the latest epochs

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.dataset) / self.num_workers)


def train_loop(loop_config: dict[str, TrainConfig]) -> None:
    """Train from the latest checkpoint of the run directory, or from the start (the function that Ray Train runs).

    Args:
        loop_config: The one entry "config"; its paths are absolute.
    """
    config = loop_config["config"]
    torch.set_num_threads(config.cpus_per_worker)
    checkpoint = latest_checkpoint(Path(config.out))
    worker = _build(config, checkpoint)
    for epoch in range(checkpoint.state["epoch"] if checkpoint else 0, config.num_epochs):
        start = time.monotonic()
        losses = _mean_over_workers(list(_train_epoch(worker, epoch)), worker)
        record = _record(worker, epoch, losses, time.monotonic() - start)
        worker.records = [*worker.records, record][-_NUM_RECORDS:]
        if worker.rank == 0:
            _save(worker, epoch + 1)
        # Ray is told the numbers alone: its own record of checkpoints would be a second truth beside the manifests.
        ray.train.report({"records": worker.records})


def training_settings(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint records of its origin, as JSON values."""
    return {
        "model": asdict(config.model),
        "num_labels": dataset.num_labels,
        "classes": list(dataset.classes),
        "train": {name: value for name, value in asdict(config).items() if name not in ("model", "tracking")},
    }


def _build(config: TrainConfig, checkpoint: Checkpoint | None) -> _Worker:
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
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    records = checkpoint.state.get("records", []) if checkpoint else []
    return _Worker(config, dataset, network, objective, optimizer, rank, num_workers, records)


def _train_epoch(worker: _Worker, epoch: int) -> Iterator[dict[str, float]]:
    """Train on every image once; the losses of each step by name."""
    config = worker.config
    head_only = epoch < config.num_head_epochs
    log = EpochLog(config.out, f"epoch {epoch + 1}/{config.num_epochs}", worker.steps_per_epoch, worker.num_workers)
    for index, sample in enumerate(_samples(worker, epoch)):
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
            log.add(index, values)
        yield values


def _mean_over_workers(losses: list[dict[str, float]], worker: _Worker) -> dict[str, list[float]]:
    """Each loss of each step; all workers take equally many, and have the same losses."""
    sums = torch.tensor([list(step.values()) for step in losses], dtype=torch.float64)  # (steps, losses)
    if worker.num_workers > 1:
        sums = sums.to(next(worker.network.parameters()).device)
        torch.distributed.all_reduce(sums)
    return dict(zip(losses[0], (sums / worker.num_workers).T.tolist(), strict=True))


def _record(worker: _Worker, epoch: int, losses: dict[str, list[float]], seconds: float) -> dict[str, Any]:
    """What the driver logs of an epoch, as JSON values."""
    num_steps = worker.steps_per_epoch
    spans = [(begin, min(begin + _STEPS_PER_POINT, num_steps)) for begin in range(0, num_steps, _STEPS_PER_POINT)]
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * num_steps,
        "time_ms": int(time.time() * 1000),
        "points": [
            [epoch * num_steps + end, {name: _mean(curve[begin:end]) for name, curve in losses.items()}]
            for begin, end in spans
        ],
        "losses": {name: _mean(curve) for name, curve in losses.items()},
        "images_per_second": num_steps * worker.num_workers / seconds,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _samples(worker: _Worker, epoch: int) -> DataLoader[Sample]:
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
    return DataLoader(worker.dataset, batch_size=None, sampler=sampler)  # pyright: ignore[reportArgumentType]


def _save(worker: _Worker, epoch: int) -> None:
    run = Path(worker.config.out)
    save_checkpoint(
        epoch_folder(run, epoch),
        worker.network.state_dict(),
        training_settings(worker.config, worker.dataset),
        optimizer_tensors(worker.optimizer, worker.network),
        {"epoch": epoch, "step": epoch * worker.steps_per_epoch, "records": worker.records},
    )
    for folder in sorted((run / FOLDER).glob("epoch_*"))[: -worker.config.keep_checkpoints]:
        shutil.rmtree(folder)
