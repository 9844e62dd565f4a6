"""Loops in parts on several threads: at once, with errors, from several callers, after a fork."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, get_ident

import numpy as np
import pytest

from instseg.lattice.cpu.threads import run

BOUNDS = np.array([0, 3, 7])


def test_parts_run_at_once_and_the_first_on_the_callers_thread():
    both, threads = Barrier(2, timeout=60), {}

    def loop(start: int, stop: int, out: np.ndarray) -> None:
        both.wait()
        threads[start] = get_ident()
        out[start:stop] += 1

    run(loop, BOUNDS, out := np.zeros(7))
    assert (out == 1).all()
    assert threads[0] == get_ident() != threads[3]


def test_a_single_part_needs_no_thread(monkeypatch):
    monkeypatch.setattr("instseg.lattice.cpu.threads._pool", None)
    run(lambda start, stop, out: out.fill(stop - start), np.array([0, 7]), out := np.zeros(7))
    assert (out == 7).all()


@pytest.mark.parametrize("failing", [0, 3])
def test_what_a_part_raises_arrives_once_all_parts_have_ended(failing):
    failed, out = Event(), np.zeros(7)

    def loop(start: int, stop: int) -> None:
        if start == failing:
            failed.set()
            raise MemoryError(f"part from {start}")
        assert failed.wait(60)
        out[start:stop] = 1

    with pytest.raises(MemoryError, match=f"part from {failing}"):
        run(loop, BOUNDS)
    assert out.sum() == 7 - (3 if failing == 0 else 4)


def test_several_callers_at_once():
    callers = Barrier(4, timeout=60)

    def loop(start: int, stop: int, out: np.ndarray) -> None:
        out[start:stop] += np.arange(start, stop)

    def call(number: int) -> np.ndarray:
        out = np.full(7, float(number))
        callers.wait()
        for _ in range(100):
            run(loop, BOUNDS, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        for number, out in enumerate(pool.map(call, range(4))):
            assert (out == number + 100 * np.arange(7)).all()


def test_a_forked_process_has_threads_of_its_own():
    """And both processes come to an end, with threads that wait for work."""
    code = """
import os, torch
from instseg.lattice.cpu.rows import softmax_backward
torch.set_num_threads(2)
q, grad = torch.full((8000, 3), 1 / 3), torch.arange(24000.0).reshape(8000, 3)
expected = softmax_backward(q, grad)
child = os.fork()
same = (softmax_backward(q, grad).numpy() == expected.numpy()).all()
if child:
    assert os.waitpid(child, 0)[1] == 0
assert same
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)
