"""What each training worker does: its share of every step's images, and a checkpoint now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import ray.train
import ray.train.collective
import torch
from torch import Tensor

from instseg.jobs.run_log import EpochLog
from instseg.jobs.train_report import WAIT, FailedStep, add_record, delete_failed_step, report, save_failed_step
from instseg.jobs.train_worker import Loop, Worker, build_worker, shares
from instseg.jobs.validations import stopped
from instseg.models.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from instseg.storage import StoragePath
from instseg.structures import Sample
from instseg.training.optimizer import learning_rates, set_learning_rate, take_step
from instseg.training.order import batches, dropout_seed
from instseg.training.step import accumulate_gradients, gradient_norm


def train_loop(loop_config: dict[str, Loop]) -> None:
    """Train from the latest checkpoint of the run directory, or from the start (the function that Ray Train runs).

    Where a loss is not finite all workers return, and leave the step in the run directory: what they would raise Ray
    Train would have them try again.

    Args:
        loop_config: The one entry "loop".
    """
    loop = loop_config["loop"]
    torch.set_num_threads(loop.config.cpus_per_worker)
    run = StoragePath.of(loop.config.out)
    worker = build_worker(loop, _agree_on_checkpoint(run))
    if worker.rank == 0:
        delete_failed_step(run)
    try:
        while worker.progress.epoch < loop.config.num_epochs and not _agree_to_stop(worker):
            _train_epoch(worker)
    except FailedStep as failed:
        if worker.rank == 0:
            save_failed_step(worker, failed)


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


def _agree_to_stop(worker: Worker) -> bool:
    """Whether validation has shown rank 0 that the run gets no better."""
    config = worker.config
    if config.validation.patience is None:
        return False
    answer = stopped(config.out, config.validation) if worker.rank == 0 else None
    return bool(ray.train.collective.broadcast_from_rank_zero(answer))


def _train_epoch(worker: Worker) -> None:
    """Train on every image once, or on those that are left, with a checkpoint at the end and every few steps."""
    steps = _steps(worker)
    start = time.monotonic()
    while span := list(islice(steps, worker.config.checkpoint_every)):
        curves = _mean_over_workers(span, worker)
        add_record(worker, curves, time.monotonic() - start)
        report(worker)
        if _agree_to_stop(worker):
            return
        start = time.monotonic()


def _steps(worker: Worker) -> Iterator[dict[str, float]]:
    """Take the steps of the epoch; of each the losses by name, the rates, and the wait for the images."""
    config, progress, epoch = worker.config, worker.progress, worker.progress.epoch
    size, first = worker.batch_size, progress.images
    # Whole, unless other workers began the epoch with steps of another size.
    step = epoch * worker.steps_per_epoch + first / size
    parts = batches(len(worker.dataset), size, config.seed, epoch, first)
    log = EpochLog(worker.log, epoch, config.num_epochs, worker.steps_per_epoch, size, first // size)
    for index, (samples, wait_ms) in enumerate(shares(worker, parts, epoch)):
        values, norm = _take_step(worker, samples, step + index, parts[index])
        progress.images += size
        progress.step += 1
        if worker.rank == 0:
            log.add(values, wait_ms)
        yield {**values, "gradient_norm": norm, **learning_rates(worker.optimizer), WAIT: wait_ms}


def _take_step(
    worker: Worker, samples: Sequence[Sample], step: float, batch: Sequence[int]
) -> tuple[dict[str, float], float]:
    """The mean of each loss over this worker's samples, and the norm of the gradient.

    Raises:
        FailedStep: If a loss of any worker or the gradient is not finite; in all workers, before the network moves.
    """
    config, places = worker.config, range(worker.share.start, worker.share.stop)
    set_learning_rate(worker.optimizer, config, step, worker.steps_per_epoch)
    worker.optimizer.zero_grad(set_to_none=True)
    seeds = [dropout_seed(config.seed, step, place) for place in places]
    head_only = worker.progress.epoch < config.num_head_epochs
    totals, losses = accumulate_gradients(worker.objective, samples, seeds, config.accumulate, head_only)
    norm = gradient_norm(worker.network.parameters())
    _check_finite(worker, totals, norm, batch)
    take_step(worker.optimizer)
    return {name: loss.mean().item() for name, loss in losses.items()}, norm


def _check_finite(worker: Worker, totals: Tensor, norm: float, batch: Sequence[int]) -> None:
    of_all = torch.zeros(len(batch), dtype=torch.float64, device=worker.device)
    of_all[worker.share] = totals.double()
    if worker.num_workers > 1:
        torch.distributed.all_reduce(of_all)
    if not of_all.isfinite().all() or not math.isfinite(norm):
        ids = [worker.dataset.image_ids[index] for index in batch]
        raise FailedStep(list(zip(ids, of_all.tolist(), strict=True)), norm)


def _mean_over_workers(steps: Sequence[dict[str, float]], worker: Worker) -> dict[str, list[float]]:
    """Each quantity at each step; all workers take equally many, and have the same quantities."""
    sums = torch.tensor([list(step.values()) for step in steps], dtype=torch.float64)  # (steps, quantities)
    if worker.num_workers > 1:
        sums = sums.to(worker.device)
        torch.distributed.all_reduce(sums)
    return dict(zip(steps[0], (sums / worker.num_workers).T.tolist(), strict=True))
