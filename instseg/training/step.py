"""One step of training: the images that a worker has of it, forward and backward, and the move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instseg.structures import Sample


def accumulate_gradients(
    objective: nn.Module, samples: Sequence[Sample], seeds: Sequence[int], num_passes: int, head_only: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave in the parameters the gradient of the mean total of all workers' samples.

    Args:
        objective: `Objective`, or DDP around it; its gradients are None.
        samples: This worker's P.
        seeds: P, as of `Objective`.
        num_passes: How many parts of equal size, one after the other, they pass it in. Workers are waited for in the
            last one.
        head_only: As of `Objective`.

    Returns:
        (P,) the totals, and (P,) each loss by name, detached.
    """
    size = len(samples) // num_passes
    totals, losses = [], []
    for first in range(0, len(samples), size):
        part = slice(first, first + size)
        is_last = first + size >= len(samples)
        with nullcontext() if is_last or not isinstance(objective, DistributedDataParallel) else objective.no_sync():
            total, loss = objective(samples[part], seeds[part], head_only)
            (total.mean() / num_passes).backward()
        totals.append(total.detach())
        losses.append(loss)
    return torch.cat(totals), {name: torch.cat([loss[name].detach() for loss in losses]) for name in losses[0]}


def gradient_norm(parameters: Iterator[nn.Parameter]) -> float:
    """The Euclidean norm of all gradients together; the same on all workers, as the gradients are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()
