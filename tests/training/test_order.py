"""The order of the images: whole epochs, whoever takes them, in steps of any size."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain

import pytest
from torch.utils.data.distributed import DistributedSampler

from instseg.training.order import batches, dropout_seed, view_seed


def flat(steps: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 16])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_image_is_taken_and_the_first_fill_up_the_last_step(size: int, epoch: int) -> None:
    steps = batches(7, size, seed=5, epoch=epoch)
    order = flat(steps)
    assert {len(step) for step in steps} == {size}
    assert len(order) == -(-7 // size) * size
    assert sorted(order[:7]) == list(range(7))
    assert order == (3 * order[:7])[: len(order)]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_one_image_a_worker_is_what_torchs_sampler_gives(num_workers: int) -> None:
    steps = batches(10, num_workers, seed=3, epoch=4)
    for rank in range(num_workers):
        sampler = DistributedSampler(range(10), num_workers, rank, seed=3)  # pyright: ignore[reportArgumentType]
        sampler.set_epoch(4)
        assert [step[rank] for step in steps] == list(sampler)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [flat(batches(20, 2, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("first", range(10))
@pytest.mark.parametrize("size", [1, 3, 4])
def test_an_epoch_goes_on_with_steps_of_another_size(first: int, size: int) -> None:
    whole = flat(batches(10, 1, seed=0, epoch=0))
    left = flat(batches(10, size, seed=0, epoch=0, first=first))
    assert left[: 10 - first] == whole[first:]


def test_seeds_are_the_same_in_every_process() -> None:
    """Whatever seeds Python's own hashes; a step that is counted as a float is the same step."""
    script = "from instseg.training.order import *; print(dropout_seed(1, 7, 2), view_seed(1, 2, 'image'))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(dropout_seed(1, 7.0, 2)), str(view_seed(1, 2, "image"))]
    assert len({dropout_seed(seed, step, place) for seed in (0, 1) for step in (0, 1) for place in (0, 1)}) == 8
    assert len({view_seed(seed, epoch, name) for seed in (0, 1) for epoch in (0, 1) for name in "ab"}) == 8
