"""Which processors a run gets: arithmetic on what the nodes of a cluster have, without Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from instseg.config import Device

Processor = Literal["cpu", "gpu"]
_PARTS = 10_000  # Ray counts resources in ten-thousandths


class Node(NamedTuple):
    """Whole CPUs and GPUs that a node offers."""

    cpus: int
    gpus: int


class EvaluatorPlan(NamedTuple):
    """How many actors evaluate, on what, and which part of a GPU each of them reserves (0 on CPUs)."""

    device: Processor
    num_actors: int
    gpus_per_actor: float


def training_device(device: Device, num_workers: int, cpus_per_worker: int, nodes: Sequence[Node]) -> Processor:
    """What to train on: "auto" means GPUs if there is one for each worker, else CPUs.

    Raises:
        ValueError: If there are fewer CPUs or GPUs than the workers need.
    """
    on_cpus = sum(node.cpus // cpus_per_worker for node in nodes)
    on_gpus = sum(min(node.cpus // cpus_per_worker, node.gpus) for node in nodes)
    chosen: Processor = "gpu" if device == "gpu" or (device == "auto" and on_gpus >= num_workers) else "cpu"
    room = on_gpus if chosen == "gpu" else on_cpus
    if num_workers > room:
        each = f"{cpus_per_worker} CPU" + (" and a GPU" if chosen == "gpu" else "")
        raise ValueError(
            f"num_workers: expected at most {room} with {each} each, got {num_workers}; the cluster has "
            f"{describe(nodes)}. Lower --num-workers or --cpus-per-worker, or choose another --device"
        )
    return chosen


def plan_evaluators(device: Device, num_actors: int | None, num_images: int, nodes: Sequence[Node]) -> EvaluatorPlan:
    """How to evaluate: "auto" means GPUs if there are any, which the actors of a node then share evenly.

    Args:
        device: What was asked for.
        num_actors: Default: one for each CPU of the nodes that take part, and no more than images.
        num_images: At least 1.
        nodes: Those of the cluster.

    Raises:
        ValueError: If there are fewer CPUs than actors, or no GPU although one was asked for.
    """
    has_gpus = any(min(node) > 0 for node in nodes)
    if device == "gpu" and not has_gpus:
        raise ValueError(f"device: expected a cluster with GPUs, got {describe(nodes)}; use --device cpu")
    on_gpus = device == "gpu" or (device == "auto" and has_gpus)
    room = sum(node.cpus for node in nodes if node.gpus or not on_gpus)
    if num_actors is None:
        num_actors = min(room, num_images)
    if not 0 < num_actors <= room:
        place = "beside GPUs, or --device cpu" if on_gpus else "in all"
        raise ValueError(
            f"num_actors: expected at most {room}, one for each CPU {place}, got {num_actors}; "
            f"the cluster has {describe(nodes)}"
        )
    if not on_gpus:
        return EvaluatorPlan("cpu", num_actors, 0.0)
    # The least k such that k actors on each GPU are enough. The part 1/k of a GPU, rounded down, fits k times.
    share = next(k for k in range(1, room + 1) if _places(nodes, k) >= num_actors)
    return EvaluatorPlan("gpu", num_actors, math.floor(_PARTS / share) / _PARTS)


def describe(nodes: Sequence[Node]) -> str:
    """What there is, e.g. "12 CPUs and 8 GPUs on 2 nodes"."""
    cpus, gpus = (sum(column) for column in zip(*nodes, strict=True)) if nodes else (0, 0)
    return f"{_count(cpus, 'CPU')} and {_count(gpus, 'GPU')} on {_count(len(nodes), 'node')}"


def _places(nodes: Sequence[Node], share: int) -> int:
    """How many actors of one CPU find a place if `share` of them have a GPU together."""
    return sum(min(node.cpus, node.gpus * share) for node in nodes)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
