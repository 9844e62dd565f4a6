"""Memory that is kept: who holds it, when it comes back, the limit."""

from __future__ import annotations

import gc

import pytest
import torch

from instseg.lattice import memory
from instseg.lattice.memory import empty

MEGABYTES = 1 << 18  # float32 elements


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    gc.collect()
    monkeypatch.setattr(memory, "_free", [])


def test_memory_comes_back_when_the_last_view_is_gone():
    tensor = empty((4 * MEGABYTES,), torch.float32)
    address, view = tensor.data_ptr(), tensor[5:].numpy()
    del tensor
    other = empty((4 * MEGABYTES,), torch.float32)
    assert other.data_ptr() != address
    del view
    assert empty((1, 3 * MEGABYTES), torch.float32).data_ptr() == address


def test_tensors_do_not_overlap():
    tensors = [empty((2, MEGABYTES), torch.float32).fill_(index) for index in range(5)]
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))


def test_small_and_much_too_large_memory_is_not_given():
    large = empty((64 * MEGABYTES,), torch.float32)
    address = large.data_ptr()
    del large
    assert [kept.ctypes.data for kept in memory._free] == [address]
    assert empty((10,), torch.int32).data_ptr() != address
    assert empty((2 * MEGABYTES,), torch.float32).data_ptr() != address


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "_KEPT", 20 << 20)
    tensors = [empty((8 * MEGABYTES,), torch.float32) for _ in range(4)]
    last = tensors[-1].data_ptr()
    while tensors:
        tensors.pop(0)
    assert sum(kept.nbytes for kept in memory._free) <= 20 << 20
    assert memory._free[-1].ctypes.data == last


def test_a_collection_amid_the_pools_own_work_does_not_wait_for_itself():
    """Garbage collection may run a finalizer at any allocation, so also while this thread holds the lock."""
    tensor = empty((4 * MEGABYTES,), torch.float32)
    address = tensor.data_ptr()
    with memory._LOCK:
        del tensor
    assert empty((4 * MEGABYTES,), torch.float32).data_ptr() == address
