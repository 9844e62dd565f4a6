#!/usr/bin/env python
"""Where a step of training goes, and what a second worker brings at the same number of images a step.

FCN-8s as published on whole photographs, and on a CPU the network of `small_end_to_end` on its views in both
precisions; both CRFs, random weights, one thread. Each part is timed by itself, in turn for each image; the CRFs'
gradient stops at the logits, where the network's begins. On a GPU the time is that of its queue.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn as start_processes
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from instseg.config import ModelConfig, TrainConfig
from instseg.crf.pairwise import build_kernels
from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.models.network import InstanceNetwork
from instseg.recipes import small_end_to_end
from instseg.structures import Sample
from instseg.training.augment import augment
from instseg.training.objective import Objective
from instseg.training.optimizer import build_optimizer, freeze, take_step
from instseg.training.step import accumulate_gradients

NUM_IMAGES, NUM_SCALED = 12, 6  # of the parts, of the scaling
Value = TypeVar("Value")


def main() -> None:
    """Print what was measured and write results/train_step.json, or train_step_<GPU>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="prepared photographs with ground truth and detections")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    result: dict[str, Any] = {"parts": {name: parts(config) for name, config in configurations(data).items()}}
    if not torch.cuda.is_available():
        result["scaling"] = scaling(small_end_to_end(data, ""))
    name = "train_step" if not torch.cuda.is_available() else f"train_step_{torch.cuda.get_device_name().split()[1]}"
    print(result, write_result(name, result))


def configurations(data: str) -> dict[str, TrainConfig]:
    """By name."""
    small = small_end_to_end(data, "")
    views = replace(small.augment, scale=(1.0, 1.0), crop=0)
    published = replace(small, model=ModelConfig(semantic="fcn8s"), frozen_stages=0, augment=views, precision="float32")
    if torch.cuda.is_available():
        return {"published": published, "published, bfloat16": replace(published, precision="bfloat16")}
    return {"published": published, "small, float32": replace(small, precision="float32"), "small": small}


def build(config: TrainConfig, num_labels: int) -> tuple[InstanceNetwork, torch.optim.Optimizer]:
    """A network with random weights, and its optimizer, where they are to run."""
    torch.manual_seed(0)
    network = InstanceNetwork(config.model, num_labels).train().to("cuda" if torch.cuda.is_available() else "cpu")
    freeze(network, config)
    return network, build_optimizer(network, config)


def parts(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Median, least and greatest milliseconds of each part over the images, and its share of the medians' sum."""
    dataset = PreparedDataset(config.data)
    network, optimizer = build(config, dataset.num_labels)
    objective = Objective(network, config)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Value]) -> Value:
        start = time.perf_counter()
        value = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.setdefault(name, []).append(1000 * (time.perf_counter() - start))
        return value

    for index in range(NUM_IMAGES + 1):
        if index == 1:  # the first one warms up
            times.clear()
        sample = timed("data", lambda i=index: augment(dataset[i], config.augment, i))
        logits = timed("network forward", lambda s=sample: objective._logits(s))
        _time_crfs(objective, sample, logits, timed)
        timed("optimizer", lambda: take_step(optimizer))
        optimizer.zero_grad(set_to_none=True)
    times["data wait"] = _waits(dataset, config, sum(map(statistics.median, times.values())) / 1000)
    of_step = sum(statistics.median(values) for name, values in times.items() if name not in ("data", "lattice"))
    return {name: _summary(values, of_step) for name, values in times.items()}


def _time_crfs(objective: Objective, sample: Sample, logits: torch.Tensor, timed: Callable[..., Any]) -> None:
    """Forward and backward of what follows the logits, and the network's backward. Forward has the lattice too."""
    image, config = torch.from_numpy(sample.image).to(logits), objective.config
    timed("lattice", lambda: build_kernels(image, config.model.semantic_crf.kernels))
    leaf = logits.detach().requires_grad_()
    losses = timed("CRFs forward", lambda: objective._losses(sample, leaf))
    total = config.semantic_loss_weight * losses["semantic_loss"] + losses["instance_loss"]
    timed("CRFs backward", total.backward)
    timed("network backward", lambda: logits.backward(leaf.grad))


def _waits(dataset: PreparedDataset, config: TrainConfig, step_s: float) -> list[float]:
    """Milliseconds that steps of a given length wait for images that are read meanwhile."""
    samples = read_ahead(lambda i: augment(dataset[i], config.augment, i), range(NUM_IMAGES))
    waits = []
    for _ in range(NUM_IMAGES):
        start = time.perf_counter()
        next(samples)
        waits.append(1000 * (time.perf_counter() - start))
        time.sleep(min(step_s, 1.0))
    return waits[1:]


def _summary(values: list[float], of_step: float) -> dict[str, float]:
    median = statistics.median(values)
    return {"median_ms": median, "min_ms": min(values), "max_ms": max(values), "share": median / of_step}


def scaling(config: TrainConfig) -> dict[str, Any]:
    """Two images a step: seconds of one worker, of two, the efficiency of the second, and of that the all-reduce."""
    alone, together = _train(1, config), _train(2, config)
    ratios = sorted(a / b / 2 for a, b in zip(alone, together, strict=True))
    return {
        "one_worker_s": alone,
        "two_workers_s": together,
        "efficiency": [ratios[0], statistics.median(ratios), ratios[-1]],
        "all_reduce_s": _spawn(_reduce, 2, config),
    }


def _train(num_workers: int, config: TrainConfig) -> list[float]:
    return _spawn(_steps, num_workers, config)


def _spawn(work: Callable[..., None], num_workers: int, config: TrainConfig) -> list[float]:
    """Seconds of each step, as rank 0 measures them."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (num_workers, config, folder), num_workers)
        return [float(line) for line in (Path(folder) / "seconds").read_text().split()]


def _steps(rank: int, num_workers: int, config: TrainConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dataset = PreparedDataset(config.data)
    network, optimizer = build(config, dataset.num_labels)
    _join(rank, num_workers, folder)
    objective: torch.nn.Module = Objective(network, config)
    if num_workers > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    seconds = []
    for step in range(NUM_SCALED + 1):
        samples = [augment(dataset[2 * step + k], config.augment, k) for k in range(2)][rank::num_workers]
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(objective, samples, [0] * len(samples), len(samples), head_only=False)
        take_step(optimizer)
        seconds.append(time.perf_counter() - start)
    _leave(rank, folder, seconds[1:])


def _reduce(rank: int, num_workers: int, config: TrainConfig, folder: str) -> None:
    """Add up as many numbers as there are gradients, at once."""
    torch.set_num_threads(1)
    network, _ = build(config, PreparedDataset(config.data).num_labels)
    _join(rank, num_workers, folder)
    numbers = torch.zeros(sum(p.numel() for p in network.parameters() if p.requires_grad))
    seconds = []
    for _ in range(NUM_SCALED):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        seconds.append(time.perf_counter() - start)
    _leave(rank, folder, seconds)


def _join(rank: int, num_workers: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=num_workers)


def _leave(rank: int, folder: str, seconds: list[float]) -> None:
    if rank == 0:
        (Path(folder) / "seconds").write_text("\n".join(map(str, seconds)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
