"""What each training worker does: one image a step, gradients averaged over the workers, a checkpoint per epoch."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.models.checkpoint import (
    FOLDER,
    Checkpoint,
    epoch_folder,
    latest_checkpoint,
    save_checkpoint,
)
from instseg.models.network import InstanceNetwork
from instseg.structures import Sample
from instseg.training.losses import instance_loss, semantic_loss

LOG = "train.log"
_LINE_EVERY_S = 10.0


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

    def forward(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Total, semantic and instance loss, scalars."""
        output = self.network(sample, self.config.ablation)
        semantic = semantic_loss(output.log_q, sample.semantic, self.config.probability_floor)
        labels = sample.detections.labels
        truth, config = (sample.known_instances, sample.instance_labels), self.config
        instance = instance_loss(output.instance_log_q, labels, *truth, config.instance_loss, config.probability_floor)
        total = self.config.semantic_loss_weight * semantic + self.config.instance_loss_weight * instance
        # An ablation leaves CRF parameters out of the graph; DDP waits for the gradient of every one.
        return total + 0 * sum(p.sum() for p in self.network.crf_parameters()), semantic, instance


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
        losses = list(_train_epoch(worker, epoch))
        if worker.rank == 0:
            _save(worker, epoch + 1)
        # Ray is told the numbers alone: its own record of checkpoints would be a second truth beside the manifests.
        ray.train.report(
            {
                "epoch": epoch + 1,
                "step": (epoch + 1) * worker.steps_per_epoch,
                "semantic_loss": [semantic for semantic, _ in losses],
                "instance_loss": [instance for _, instance in losses],
                "seconds": time.monotonic() - start,
            }
        )


def log_line(run: str, text: str) -> None:
    """Append a line to the run's log, which the driver shows while it waits."""
    with (Path(run) / LOG).open("a") as file:
        file.write(f"{text}\n")


def training_settings(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint records of its origin, as JSON values."""
    return {
        "model": asdict(config.model),
        "num_labels": dataset.num_labels,
        "classes": list(dataset.classes),
        "train": {name: value for name, value in asdict(config).items() if name not in ("model", "tracking")},
    }


def _build(config: TrainConfig, checkpoint: Checkpoint | None) -> _Worker:
    dataset = PreparedDataset(config.data)
    torch.manual_seed(config.seed)
    model = replace(config.model, semantic_weights=None) if checkpoint else config.model
    network = InstanceNetwork(model, dataset.num_labels).train()
    if checkpoint:
        network.restore(checkpoint)
    objective = ray.train.torch.prepare_model(
        Objective(network, config), parallel_strategy_kwargs={"gradient_as_bucket_view": True}
    )
    compatibility = network.semantic_crf.dense.compatibility
    weights = [parameter for parameter in network.crf_parameters() if parameter is not compatibility]
    groups = [
        {"params": weights, "lr": config.learning_rate_crf},
        {"params": [compatibility], "lr": config.learning_rate_compatibility},
        {"params": list(network.semantic_parameters()), "lr": config.learning_rate_network},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if checkpoint:
        _restore_optimizer(optimizer, network, checkpoint)
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    return _Worker(config, dataset, network, objective, optimizer, rank, num_workers)


def _train_epoch(worker: _Worker, epoch: int) -> Iterator[tuple[float, float]]:
    """Train on every image once; the semantic and instance loss of each step."""
    report = _Progress(worker, epoch)
    for index, sample in enumerate(_samples(worker, epoch)):
        step = epoch * worker.steps_per_epoch + index
        # Dropout depends on the step alone, so that a resumed run repeats an uninterrupted one bit by bit.
        torch.manual_seed(hash((worker.config.seed, step, worker.rank)) % 2**63)
        _set_learning_rate(worker, step)
        worker.optimizer.zero_grad(set_to_none=True)
        total, semantic, instance = worker.objective(sample)
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss is {total.item()} at {sample.image_id}; lower the learning rates")
        total.backward()
        worker.optimizer.step()
        losses = semantic.item(), instance.item()
        report.add(index, losses)
        yield losses


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


def _set_learning_rate(worker: _Worker, step: int) -> None:
    num_steps = worker.config.num_epochs * worker.steps_per_epoch
    cosine = worker.config.learning_rate_schedule == "cosine"
    factor = 0.5 * (1 + math.cos(math.pi * step / num_steps)) if cosine else 1.0
    for group in worker.optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


class _Progress:
    """Logs rank 0's mean losses so far every few seconds."""

    def __init__(self, worker: _Worker, epoch: int) -> None:
        self.worker = worker
        self.epoch = epoch
        self.sums = [0.0, 0.0]
        self.start = self.last = time.monotonic()

    def add(self, index: int, losses: tuple[float, float]) -> None:
        self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
        now = time.monotonic()
        if self.worker.rank == 0 and now - self.last > _LINE_EVERY_S:
            self.last = now
            done, num_steps = index + 1, self.worker.steps_per_epoch
            semantic, instance = (total / done for total in self.sums)
            rate = done * self.worker.num_workers / (now - self.start)
            log_line(
                self.worker.config.out,
                f"epoch {self.epoch + 1}/{self.worker.config.num_epochs}, step {done}/{num_steps}: "
                f"semantic loss {semantic:.4f}, instance loss {instance:.4f}, {rate:.2f} images/s",
            )


def _save(worker: _Worker, epoch: int) -> None:
    run = Path(worker.config.out)
    save_checkpoint(
        epoch_folder(run, epoch),
        worker.network.state_dict(),
        training_settings(worker.config, worker.dataset),
        _optimizer_tensors(worker.optimizer, worker.network),
        {"epoch": epoch, "step": epoch * worker.steps_per_epoch},
    )
    for folder in sorted((run / FOLDER).glob("epoch_*"))[: -worker.config.keep_checkpoints]:
        shutil.rmtree(folder)


def _optimizer_tensors(optimizer: torch.optim.Adam, network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{quantity}": tensor
        for name, parameter in network.named_parameters()
        for quantity, tensor in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(optimizer: torch.optim.Adam, network: nn.Module, checkpoint: Checkpoint) -> None:
    parameters = dict(network.named_parameters())
    for key, tensor in checkpoint.optimizer().items():
        name, quantity = key.rsplit(".", 1)
        device = "cpu" if quantity == "step" else parameters[name].device
        optimizer.state[parameters[name]][quantity] = tensor.to(device)
