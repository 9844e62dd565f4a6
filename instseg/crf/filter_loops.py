"""The compiled loops of `lattice_numba`: filters and softmax.

Pixels come in bands, whose number depends on the image alone. A band adds what its pixels splat to rows of its own, one
for each vertex that it touches, and `combine` adds the bands' rows in order: nothing depends on which thread took which
band. Rows of labels are padded to whole vectors; what stands in the padding never reaches a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from instseg.crf.simd import (
    add,
    broadcast,
    exp2,
    flush,
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


class Corners(NamedTuple):
    """Where pixels read and write.

    Attributes:
        bands: (B+1,) int64, where each band of pixels starts.
        first_rows: (B+1,) int64, where each band's own rows start.
        vertex_of_row: (R,) int32, the vertex that each row is a part of.
        kernel_of_column: (C,) int64, to which kernel each corner belongs.
        vertices: (N, C) int32, the corners of each pixel's simplices, as rows counted from its band's first.
        weights: (N, C), the barycentric coordinates.
    """

    bands: np.ndarray
    first_rows: np.ndarray
    vertex_of_row: np.ndarray
    kernel_of_column: np.ndarray
    vertices: np.ndarray
    weights: np.ndarray


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return njit(nogil=True, cache=True, **options)


@_compiled()
def _slice_block(first, num_rows, first_row, corners, scales, table, energy, out, target):
    """out[target + p] = energy[first + p] + sum over the corners of scale * weight * table[vertex].

    A single row of `energy` or of `table` stands for all.
    """
    width = out.shape[1]
    energy_step = width if len(energy) > 1 else 0
    table_step = width if len(table) > 1 else 0
    for p in range(num_rows):
        i, row, to = first + p, (first + p) * energy_step, (target + p) * width
        lane = 0
        while lane + 24 <= width:  # three vectors at a time, so that corners are read less often
            a, b, c = load(energy, row + lane), load(energy, row + lane + 8), load(energy, row + lane + 16)
            for k in range(corners.vertices.shape[1]):
                w = corners.weights[i, k] * scales[i, corners.kernel_of_column[k]]
                at = corners.vertex_of_row[first_row + corners.vertices[i, k]] * table_step + lane
                a = multiply_add(a, w, load(table, at))
                b = multiply_add(b, w, load(table, at + 8))
                c = multiply_add(c, w, load(table, at + 16))
            store(out, to + lane, a)
            store(out, to + lane + 8, b)
            store(out, to + lane + 16, c)
            lane += 24
        while lane < width:
            a = load(energy, row + lane)
            for k in range(corners.vertices.shape[1]):
                w = corners.weights[i, k] * scales[i, corners.kernel_of_column[k]]
                at = corners.vertex_of_row[first_row + corners.vertices[i, k]] * table_step + lane
                a = multiply_add(a, w, load(table, at))
            store(out, to + lane, a)
            lane += 8


@_compiled()
def _scatter_block(first, num_rows, first_row, corners, scales, values, source, sums):
    """sums[row of the corner] += scale * weight * values[source + p]."""
    width = values.shape[1]
    for p in range(num_rows):
        i, row = first + p, (source + p) * width
        lane = 0
        while lane + 24 <= width:
            a, b = flush(load(values, row + lane)), flush(load(values, row + lane + 8))
            c = flush(load(values, row + lane + 16))
            for k in range(corners.vertices.shape[1]):
                w = corners.weights[i, k] * scales[i, corners.kernel_of_column[k]]
                at = (first_row + corners.vertices[i, k]) * width + lane
                store(sums, at, multiply_add(load(sums, at), w, a))
                store(sums, at + 8, multiply_add(load(sums, at + 8), w, b))
                store(sums, at + 16, multiply_add(load(sums, at + 16), w, c))
            lane += 24
        while lane < width:
            a = flush(load(values, row + lane))
            for k in range(corners.vertices.shape[1]):
                w = corners.weights[i, k] * scales[i, corners.kernel_of_column[k]]
                at = (first_row + corners.vertices[i, k]) * width + lane
                store(sums, at, multiply_add(load(sums, at), w, a))
            lane += 8


@_compiled()
def _softmax_block(num_rows, num_labels, block, factors):
    """block[p] = softmax(-block[p]), float32."""
    width = block.shape[1]
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


@_compiled()
def _clear(first_row, last_row, sums):
    zero = broadcast(sums.dtype.type(0))
    for at in range(first_row * sums.shape[1], last_row * sums.shape[1], 8):
        store(sums, at, zero)


@_compiled()
def copy_rows(start, stop, values, out):
    """Row by row; out[i] = values[i]; the padding becomes 0, as what lies there may be denormal."""
    num_labels = values.shape[1]
    for i in range(start, stop):
        for label in range(num_labels):
            out[i, label] = values[i, label]
        for label in range(num_labels, out.shape[1]):
            out[i, label] = 0


@_compiled()
def scatter(start, stop, bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights, scales, values, sums):
    """Each band's sums over its pixels of scale * weight * value, in the band's own rows."""
    corners = Corners(bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights)
    for band in range(start, stop):
        first, row = corners.bands[band], corners.first_rows[band]
        _clear(row, corners.first_rows[band + 1], sums)
        _scatter_block(first, corners.bands[band + 1] - first, row, corners, scales, values, first, sums)


@_compiled()
def combine(start, stop, offsets, rows, sums, out):
    """out[v] = the sum of the bands' rows for vertex v, in the order of the bands."""
    width = sums.shape[1]
    for v in range(start, stop):
        for lane in range(0, width, 8):
            total = broadcast(sums.dtype.type(0))
            for k in range(offsets[v], offsets[v + 1]):
                total = add(total, load(sums, rows[k] * width + lane))
            store(out, v * width + lane, total)


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
def mix_rank_one(start, stop, values, left, right, diagonal, out):
    """out[v] = <values[v], left> * right + values[v] * diagonal."""
    width = values.shape[1]
    zero = broadcast(values.dtype.type(0))
    for row in range(start * width, stop * width, width):
        total = zero
        for lane in range(0, width, 8):
            total = add(total, multiply(load(values, row + lane), load(left, lane)))
        product = reduce_add(total)
        for lane in range(0, width, 8):
            own = multiply(load(values, row + lane), load(diagonal, lane))
            store(out, row + lane, multiply_add(own, product, load(right, lane)))


@_compiled()
def slice_rows(
    start, stop, bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights, scales, table, energy, out
):
    """Out = energy + what each pixel reads from its corners."""
    corners = Corners(bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights)
    for band in range(start, stop):
        first, row = corners.bands[band], corners.first_rows[band]
        _slice_block(first, corners.bands[band + 1] - first, row, corners, scales, table, energy, out, first)


@_compiled()
def slice_softmax(
    start,
    stop,
    num_labels,
    bands,
    first_rows,
    vertex_of_row,
    kernel_of_column,
    vertices,
    weights,
    scales,
    table,
    energy,
    out,
):
    """Out = softmax(-slice_rows), float32."""
    corners = Corners(bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights)
    factors = np.empty(_BLOCK, np.float32)
    for band in range(start, stop):
        row = corners.first_rows[band]
        for first in range(corners.bands[band], corners.bands[band + 1], _BLOCK):
            num_rows = min(_BLOCK, corners.bands[band + 1] - first)
            _slice_block(first, num_rows, row, corners, scales, table, energy, out, first)
            _softmax_block(num_rows, num_labels, out[first:], factors)


@_compiled()
def slice_softmax_scatter(
    start,
    stop,
    num_labels,
    bands,
    first_rows,
    vertex_of_row,
    kernel_of_column,
    vertices,
    weights,
    after,
    table,
    energy,
    before,
    sums,
):
    """A whole step in one pass over the pixels: the marginals are splatted and not kept, float32."""
    corners = Corners(bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights)
    factors = np.empty(_BLOCK, np.float32)
    block = np.empty((_BLOCK, energy.shape[1]), np.float32)
    for band in range(start, stop):
        row = corners.first_rows[band]
        _clear(row, corners.first_rows[band + 1], sums)
        for first in range(corners.bands[band], corners.bands[band + 1], _BLOCK):
            num_rows = min(_BLOCK, corners.bands[band + 1] - first)
            _slice_block(first, num_rows, row, corners, after, table, energy, block, 0)
            _softmax_block(num_rows, num_labels, block, factors)
            _scatter_block(first, num_rows, row, corners, before, block, 0, sums)


@_compiled()
def step_backward(
    start, stop, num_labels, bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights,
    after, table, energy, before, grad_table, grad_energy, sums,
):  # fmt: skip
    """The adjoint of a whole step in one pass, float32: the marginals are computed again.

    Adds the gradient of the energy, which it also splats, to `grad_energy`.
    """
    corners = Corners(bands, first_rows, vertex_of_row, kernel_of_column, vertices, weights)
    factors = np.empty(_BLOCK, np.float32)
    q = np.empty((_BLOCK, energy.shape[1]), np.float32)
    grad = np.empty((_BLOCK, energy.shape[1]), np.float32)
    nothing = np.zeros((1, energy.shape[1]), np.float32)
    for band in range(start, stop):
        row = corners.first_rows[band]
        _clear(row, corners.first_rows[band + 1], sums)
        for first in range(corners.bands[band], corners.bands[band + 1], _BLOCK):
            num_rows = min(_BLOCK, corners.bands[band + 1] - first)
            _slice_block(first, num_rows, row, corners, after, table, energy, q, 0)
            _softmax_block(num_rows, num_labels, q, factors)
            _slice_block(first, num_rows, row, corners, before, grad_table, nothing, grad, 0)
            softmax_backward(0, num_rows, num_labels, q, grad, grad)
            for lane in range(0, num_rows * q.shape[1], 8):
                at = first * q.shape[1] + lane
                store(grad_energy, at, add(load(grad_energy, at), load(grad, lane)))
            _scatter_block(first, num_rows, row, corners, after, grad, 0, sums)


@_compiled()
def softmax(start, stop, num_labels, energy, out):
    """Marginals: exp(-energy) normalised, float32."""
    factors = np.empty(_BLOCK, np.float32)
    width = energy.shape[1]
    for first in range(start, stop, _BLOCK):
        num_rows = min(_BLOCK, stop - first)
        for at in range(first * width, (first + num_rows) * width, 8):
            store(out, at, load(energy, at))
        _softmax_block(num_rows, num_labels, out[first:], factors)


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
            store(out, lane, multiply(load(q, lane), flush(subtract(mean, load(grad, lane)))))


# One function for each, not a higher-order one: numba caches a closure for its own process only.


@_compiled(parallel=True)
def parallel_copy_rows(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        copy_rows(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_scatter(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        scatter(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_combine(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        combine(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_blur(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        blur(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_mix(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        mix(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_mix_rank_one(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        mix_rank_one(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_slice_rows(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_rows(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_slice_softmax(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_softmax(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_slice_softmax_scatter(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_softmax_scatter(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_step_backward(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        step_backward(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_softmax(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        softmax(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_softmax_backward(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        softmax_backward(bounds[part], bounds[part + 1], *arguments)
