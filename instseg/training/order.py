"""Which images each step of an epoch takes: a function of the seed and the epoch, whoever takes them."""

from __future__ import annotations

import hashlib

import torch


def batches(num_images: int, size: int, seed: int, epoch: int, first: int = 0) -> list[list[int]]:
    """The images of an epoch's steps, in an order of its own.

    Another `size` cuts the same order into other steps, so an epoch of which `first` images have been taken can go on
    with more or fewer workers, and skips and repeats none.

    Args:
        num_images: Of the data set.
        size: Images a step, of all workers together.
        seed: Of the run.
        epoch: From 0.
        first: Images that earlier steps of the epoch have taken.

    Returns:
        Indices into the data set, `size` a step. The last step is filled up from the beginning of the order, which
        therefore is taken twice in that epoch.
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(num_images, generator=generator).tolist()
    begins = range(first, num_images, size)
    return [[order[place % num_images] for place in range(begin, begin + size)] for begin in begins]


def dropout_seed(seed: int, step: float, place: int) -> int:
    """The seed of what is drawn for the image at a place, from 0, of all that a step takes.

    It knows no worker, so that a resumed run, or one with other workers, repeats an uninterrupted one.
    """
    return hash((seed, step, place)) % 2**63  # numbers, unlike text, have the same hash in every process


def view_seed(seed: int, epoch: int, image_id: str) -> int:
    """The seed of the random view that an epoch shows of an image."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
