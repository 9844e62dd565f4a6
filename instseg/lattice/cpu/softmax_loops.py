"""The compiled loops: softmax over rows of labels that are padded to whole vectors."""

from __future__ import annotations

import numpy as np
from numba import prange

from instseg.lattice.cpu.compile import compiled
from instseg.lattice.cpu.simd import (
    add,
    broadcast,
    divide,
    exp2,
    flush,
    keep_first,
    load,
    load_column,
    minimum,
    multiply,
    multiply_add,
    reduce_add,
    reduce_minimum,
    store,
    store_column,
    subtract,
)

BLOCK = 64  # pixels that a loop carries through all its steps in the first-level cache
_LOG2_E = np.float32(1.4426950408889634)
_LARGE = np.float32(1e30)
_FEW = 4  # labels up to which transposing pays


@compiled()
def softmax_block(num_rows, num_labels, block, factors):
    """block[p] = softmax(-block[p]), float32; `factors` (BLOCK,) is scratch."""
    width = block.shape[1]
    if num_labels <= _FEW:
        _softmax_of_few(num_rows, num_labels, block)
        return
    for p in range(num_rows):
        last = (p + 1) * width - 8
        lowest = keep_first(load(block, last), num_labels - width + 8, _LARGE)
        store(block, last, lowest)
        for lane in range(p * width, last, 8):
            lowest = minimum(lowest, load(block, lane))
        factors[p] = reduce_minimum(lowest) * _LOG2_E
    for p in range(num_rows):
        lowest = broadcast(factors[p])
        total = broadcast(np.float32(0))
        for lane in range(p * width, (p + 1) * width, 8):
            power = exp2(multiply_add(lowest, -_LOG2_E, load(block, lane)))
            store(block, lane, power)
            total = add(total, power)
        factors[p] = np.float32(1) / reduce_add(total)
    for p in range(num_rows):
        factor = broadcast(factors[p])
        for lane in range(p * width, (p + 1) * width, 8):
            store(block, lane, multiply(load(block, lane), factor))


@compiled()
def _softmax_of_few(num_rows, num_labels, block):
    """The same for rows of one vector: eight rows at a time, label by label."""
    labels = np.empty((_FEW, 8), np.float32)
    whole = num_rows - num_rows % 8
    for row in range(0, whole, 8):
        _softmax_of_eight(row, num_labels, block, labels)
    if whole == num_rows:
        return
    rest = np.zeros((8, 8), np.float32)
    for row in range(whole, num_rows):
        store(rest, (row - whole) * 8, load(block, row * 8))
    _softmax_of_eight(0, num_labels, rest, labels)
    for row in range(whole, num_rows):
        store(block, row * 8, load(rest, (row - whole) * 8))


@compiled()
def _softmax_of_eight(row, num_labels, block, labels):
    lowest = broadcast(_LARGE)
    for label in range(num_labels):
        energy = load_column(block, row * 8 + label)
        store(labels, label * 8, energy)
        lowest = minimum(lowest, energy)
    total = broadcast(np.float32(0))
    for label in range(num_labels):
        power = exp2(multiply(broadcast(_LOG2_E), subtract(lowest, load(labels, label * 8))))
        store(labels, label * 8, power)
        total = add(total, power)
    factor = divide(broadcast(np.float32(1)), total)
    for label in range(num_labels):
        store_column(block, row * 8 + label, multiply(load(labels, label * 8), factor))


@compiled()
def softmax(start, stop, num_labels, energy, out):
    """Marginals: exp(-energy) normalised, float32."""
    factors = np.empty(BLOCK, np.float32)
    width = energy.shape[1]
    for first in range(start, stop, BLOCK):
        num_rows = min(BLOCK, stop - first)
        for at in range(first * width, (first + num_rows) * width, 8):
            store(out, at, load(energy, at))
        softmax_block(num_rows, num_labels, out[first:], factors)


@compiled()
def softmax_backward(start, stop, num_labels, q, grad, out):
    """out[i] = -q[i] * (grad[i] - <q[i], grad[i]>)."""
    width = q.shape[1]
    zero = q.dtype.type(0)
    for i in range(start, stop):
        row, last = i * width, (i + 1) * width - 8
        total = keep_first(multiply(load(q, last), load(grad, last)), num_labels - width + 8, zero)
        for lane in range(row, last, 8):
            total = add(total, multiply(load(q, lane), load(grad, lane)))
        mean = broadcast(reduce_add(total))
        for lane in range(row, row + width, 8):
            store(out, lane, multiply(load(q, lane), flush(subtract(mean, load(grad, lane)))))


@compiled(parallel=True)
def parallel_softmax(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        softmax(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_softmax_backward(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        softmax_backward(bounds[part], bounds[part + 1], *arguments)
