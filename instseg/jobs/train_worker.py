"""A training worker: what it holds, how it is built, and the images that are its share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

from instseg.config import AugmentConfig, TrainConfig
from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.data.folds import training_images
from instseg.jobs.run_log import RunLog
from instseg.jobs.train_checks import start_from
from instseg.models.checkpoint import Checkpoint, read_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.structures import Sample
from instseg.training.objective import Objective
from instseg.training.optimizer import build_optimizer, freeze, restore_optimizer
from instseg.training.order import view_seed


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
class Progress:
    """How far a run is; a checkpoint's state, as JSON values. The same for all workers.

    Attributes:
        epoch: Epochs that are finished.
        images: Images that have been taken of the one after them.
        step: Steps that were taken by all of this run's workers, however many they were.
        epoch_steps: Those of the epoch that is not finished.
        epoch_seconds: How long they took.
        epoch_sums: Their losses and other quantities, added up by name.
        records: What the driver logs of the steps before each of the latest checkpoints.
    """

    epoch: int = 0
    images: int = 0
    step: int = 0
    epoch_steps: int = 0
    epoch_seconds: float = 0.0
    epoch_sums: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def of(checkpoint: Checkpoint | None) -> Progress:
        """That of a checkpoint, which may lack what an earlier version did not have; none without one."""
        state = checkpoint.state if checkpoint else {}
        names = {each.name for each in fields(Progress)}
        return Progress(**{name: value for name, value in state.items() if name in names})


@dataclass
class Worker:
    """A worker between two steps.

    Attributes:
        objective: `Objective`, wrapped by DDP where there is more than one worker.
        rank: Of this worker among `num_workers`.
    """

    config: TrainConfig
    settings: dict[str, Any]
    log: RunLog
    dataset: PreparedDataset
    network: InstanceNetwork
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    rank: int
    num_workers: int
    progress: Progress

    @property
    def share(self) -> slice:
        """The places of this worker's images among those that a step takes."""
        size = self.config.images_per_worker * self.config.accumulate
        return slice(self.rank * size, (self.rank + 1) * size)

    @property
    def batch_size(self) -> int:
        """Images a step, of all workers."""
        return self.num_workers * self.config.images_per_worker * self.config.accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Of a whole epoch by as many workers."""
        return math.ceil(len(self.dataset) / self.batch_size)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device


def build_worker(loop: Loop, checkpoint: Checkpoint | None) -> Worker:
    """This process's worker, as the checkpoint left it, or at the beginning of the run."""
    config = loop.config
    dataset = training_images(config)
    torch.manual_seed(config.seed)
    model = replace(config.model, semantic_weights=None) if checkpoint else config.model
    network = InstanceNetwork(model, dataset.num_labels).train()
    if checkpoint:
        network.restore(checkpoint)
    elif config.start_from is not None:
        start_from(network, read_checkpoint(config.start_from))
    freeze(network, config)
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
    return Worker(
        **vars(loop),
        dataset=dataset,
        network=network,
        objective=objective,
        optimizer=optimizer,
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        progress=Progress.of(checkpoint),
    )


def shares(worker: Worker, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[tuple[list[Sample], float]]:
    """This worker's samples of each step, as the epoch shows them, and the milliseconds that they were waited for."""
    # Not Ray Data's streaming_split: it drops the remainder, and its order is not reproducible. Decoding takes 1 % of
    # a step on a CPU, too little to share with another process.
    mine = [batch[worker.share] for batch in batches]
    samples = read_ahead(_reader(worker, epoch), [index for share in mine for index in share])
    for share in mine:
        start = time.monotonic()
        yield [next(samples) for _ in share], 1000 * (time.monotonic() - start)


def _reader(worker: Worker, epoch: int) -> Callable[[int], Sample]:
    """What shows an image as the epoch does."""
    config, dataset = worker.config, worker.dataset
    if config.augment == AugmentConfig():
        return dataset.__getitem__
    from instseg.training.augment import augment  # and torchvision, which takes seconds

    def view(index: int) -> Sample:
        seed = view_seed(config.seed, epoch, dataset.image_ids[index])
        return augment(dataset[index], config.augment, seed)

    return view
