"""The compiled loops of `lattice_numba`: filters and softmax. Each writes every row of a range once.

Rows of labels are padded to whole vectors; what stands in the padding never reaches a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from instseg.crf.simd import (
    add,
    broadcast,
    exp2,
    keep_first,
    load,
    minimum,
    multiply,
    multiply_add,
    reduce_add,
    reduce_minimum,
    store,
    subtract,
)

_BLOCK = 64  # pixels that a loop carries through all its steps in the first-level cache
_LOG2_E = np.float32(1.4426950408889634)
_LARGE = np.float32(1e30)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return njit(nogil=True, cache=True, **options)


@_compiled()
def splat(start, stop, offsets, points, weights, values, out):
    """out[v] = sum over the run of vertex v of weight * values[point]."""
    width = values.shape[1]
    zero = broadcast(values.dtype.type(0))
    for v in range(start, stop):
        lane = 0
        while lane + 24 <= width:  # three vectors at a time, so that a run is read less often
            a, b, c = zero, zero, zero
            for k in range(offsets[v], offsets[v + 1]):
                w, at = weights[k], points[k] * width + lane
                a = multiply_add(a, w, load(values, at))
                b = multiply_add(b, w, load(values, at + 8))
                c = multiply_add(c, w, load(values, at + 16))
            store(out, v * width + lane, a)
            store(out, v * width + lane + 8, b)
            store(out, v * width + lane + 16, c)
            lane += 24
        while lane < width:
            a = zero
            for k in range(offsets[v], offsets[v + 1]):
                a = multiply_add(a, weights[k], load(values, points[k] * width + lane))
            store(out, v * width + lane, a)
            lane += 8


@_compiled()
def blur(start, stop, first_vertex, before, after, values, out):
    """out[v] = values[v] + half of both neighbours; an absent one is the last row, which is 0."""
    width, last = values.shape[1], len(values) - 1
    half = values.dtype.type(0.5)
    for v in range(start, stop):
        a, b = before[v - first_vertex], after[v - first_vertex]
        a = (a if a >= 0 else last) * width
        b = (b if b >= 0 else last) * width
        for lane in range(0, width, 8):
            neighbors = add(load(values, a + lane), load(values, b + lane))
            store(out, v * width + lane, multiply_add(load(values, v * width + lane), half, neighbors))


@_compiled()
def mix(start, stop, values, matrix, out):
    """out[v] = values[v] @ matrix, whose columns are padded and whose rows are not."""
    width = values.shape[1]
    zero = broadcast(values.dtype.type(0))
    for v in range(start, stop):
        lane = 0
        while lane + 24 <= width:
            a, b, c = zero, zero, zero
            for k in range(len(matrix)):
                w, at = values[v, k], k * width + lane
                a = multiply_add(a, w, load(matrix, at))
                b = multiply_add(b, w, load(matrix, at + 8))
                c = multiply_add(c, w, load(matrix, at + 16))
            store(out, v * width + lane, a)
            store(out, v * width + lane + 8, b)
            store(out, v * width + lane + 16, c)
            lane += 24
        while lane < width:
            a = zero
            for k in range(len(matrix)):
                a = multiply_add(a, values[v, k], load(matrix, k * width + lane))
            store(out, v * width + lane, a)
            lane += 8


@_compiled()
def slice_rows(start, stop, vertices, weights, table, energy, out):
    """out[i] = energy[i] + sum over the corners of weight * table[vertex]."""
    width, num_corners = out.shape[1], vertices.shape[1]
    for i in range(start, stop):
        row = i * width
        lane = 0
        while lane + 24 <= width:
            a, b, c = load(energy, row + lane), load(energy, row + lane + 8), load(energy, row + lane + 16)
            for k in range(num_corners):
                w, at = weights[i, k], vertices[i, k] * width + lane
                a = multiply_add(a, w, load(table, at))
                b = multiply_add(b, w, load(table, at + 8))
                c = multiply_add(c, w, load(table, at + 16))
            store(out, row + lane, a)
            store(out, row + lane + 8, b)
            store(out, row + lane + 16, c)
            lane += 24
        while lane < width:
            a = load(energy, row + lane)
            for k in range(num_corners):
                a = multiply_add(a, weights[i, k], load(table, vertices[i, k] * width + lane))
            store(out, row + lane, a)
            lane += 8


@_compiled()
def slice_softmax(start, stop, num_labels, vertices, weights, table, energy, out):
    """out[i] = softmax(-(energy[i] + sum over the corners of weight * table[vertex])), float32."""
    width = out.shape[1]
    block = np.empty((_BLOCK, width), np.float32)
    factors = np.empty(_BLOCK, np.float32)
    for first in range(start, stop, _BLOCK):
        num_rows = min(_BLOCK, stop - first)
        slice_rows(0, num_rows, vertices[first:], weights[first:], table, energy[first:], block)
        for p in range(num_rows):
            last = (p + 1) * width - 8
            end = keep_first(load(block, last), num_labels - width + 8, _LARGE)
            store(block, last, end)
            for lane in range(p * width, last, 8):
                end = minimum(end, load(block, lane))
            factors[p] = reduce_minimum(end) * _LOG2_E
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
            for lane in range(0, width, 8):
                store(out, (first + p) * width + lane, multiply(load(block, p * width + lane), factor))


@_compiled()
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
            store(out, lane, multiply(load(q, lane), subtract(mean, load(grad, lane))))


# One function for each, not a higher-order one: numba caches a closure for its own process only.


@_compiled(parallel=True)
def parallel_splat(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        splat(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_blur(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        blur(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_mix(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        mix(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_slice_rows(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_rows(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_slice_softmax(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_softmax(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_softmax_backward(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        softmax_backward(bounds[part], bounds[part + 1], *arguments)
