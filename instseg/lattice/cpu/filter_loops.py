"""The compiled loops: filters, and whole mean-field steps.

Values on the vertices stand in rows of labels, padded to whole vectors; what is in the padding never reaches a label.
Pixels come in bands, whose number depends on the image alone. A vertex has the row of its own number, which the first
band that touches it adds to; each further band adds to a row of its own behind them, and `combine` adds those to the
vertex's in order. So nothing depends on which thread took which band.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from instseg.lattice.cpu.compile import compiled
from instseg.lattice.cpu.simd import (
    add,
    broadcast,
    element,
    flush,
    keep_first,
    load,
    multiply,
    multiply_add,
    reduce_add,
    store,
)
from instseg.lattice.cpu.softmax_loops import BLOCK, softmax_backward, softmax_block

CHUNK = 1 << 13  # rows that `inner` adds up before it starts a new sum


@compiled()
def _slice_block(first, num_rows, rows, vertex_of_row, weights, table, energy, out, target):
    """out[target + p] = energy[first + p] + sum over the corners of weight * table[vertex].

    A single row of `energy` or of `table` stands for all.
    """
    width, num_corners = out.shape[1], rows.shape[1]
    energy_step = width if len(energy) > 1 else 0
    table_step = width if len(table) > 1 else 0
    for p in range(num_rows):
        corner, row, to = (first + p) * num_corners, (first + p) * energy_step, (target + p) * width
        lane = 0
        while lane + 24 <= width:  # three vectors at a time, so that corners are read less often
            a, b, c = load(energy, row + lane), load(energy, row + lane + 8), load(energy, row + lane + 16)
            for k in range(corner, corner + num_corners):
                w, at = element(weights, k), element(vertex_of_row, element(rows, k)) * table_step + lane
                a = multiply_add(a, w, load(table, at))
                b = multiply_add(b, w, load(table, at + 8))
                c = multiply_add(c, w, load(table, at + 16))
            store(out, to + lane, a)
            store(out, to + lane + 8, b)
            store(out, to + lane + 16, c)
            lane += 24
        while lane < width:
            a = load(energy, row + lane)
            for k in range(corner, corner + num_corners):
                at = element(vertex_of_row, element(rows, k)) * table_step + lane
                a = multiply_add(a, element(weights, k), load(table, at))
            store(out, to + lane, a)
            lane += 8


@compiled()
def _scatter_block(first, num_rows, rows, weights, values, source, sums):
    """sums[row of the corner] += weight * values[source + p]; a single row of `values` stands for all."""
    width, num_corners = values.shape[1], rows.shape[1]
    value_step = width if len(values) > 1 else 0
    for p in range(num_rows):
        corner, row = (first + p) * num_corners, (source + p) * value_step
        lane = 0
        while lane + 24 <= width:
            a, b = flush(load(values, row + lane)), flush(load(values, row + lane + 8))
            c = flush(load(values, row + lane + 16))
            for k in range(corner, corner + num_corners):
                w, at = element(weights, k), element(rows, k) * width + lane
                store(sums, at, multiply_add(load(sums, at), w, a))
                store(sums, at + 8, multiply_add(load(sums, at + 8), w, b))
                store(sums, at + 16, multiply_add(load(sums, at + 16), w, c))
            lane += 24
        while lane < width:
            a = flush(load(values, row + lane))
            for k in range(corner, corner + num_corners):
                at = element(rows, k) * width + lane
                store(sums, at, multiply_add(load(sums, at), element(weights, k), a))
            lane += 8


@compiled()
def _clear(runs, sums):
    """Zero in the `runs` (2K, 2) of rows, from first to last."""
    width, zero = sums.shape[1], broadcast(sums.dtype.type(0))
    for run in range(len(runs)):
        for at in range(runs[run, 0] * width, runs[run, 1] * width, 8):
            store(sums, at, zero)


@compiled()
def copy_rows(start, stop, values, out):
    """Row by row; out[i] = values[i]; the padding becomes 0, as what lies there may be denormal."""
    num_labels = values.shape[1]
    for i in range(start, stop):
        for label in range(num_labels):
            out[i, label] = values[i, label]
        for label in range(num_labels, out.shape[1]):
            out[i, label] = 0


@compiled()
def scatter(start, stop, bands, runs, rows, weights, values, sums):
    """Each band's sums over its pixels of weight * value, in the band's rows."""
    for band in range(start, stop):
        first = bands[band]
        _clear(runs[band], sums)
        _scatter_block(first, bands[band + 1] - first, rows, weights, values, first, sums)


@compiled()
def combine(start, stop, vertices, spilled, sums):
    """Add the `spilled` rows to those of their `vertices`, which are in order, and so are the bands of each.

    This takes the vertices that begin between start and stop.
    """
    width = sums.shape[1]
    while 0 < start < len(vertices) and vertices[start] == vertices[start - 1]:
        start += 1
    while stop < len(vertices) and vertices[stop] == vertices[stop - 1]:
        stop += 1
    for k in range(start, stop):
        row, more = element(vertices, k) * width, element(spilled, k) * width
        for lane in range(0, width, 8):
            store(sums, row + lane, add(load(sums, row + lane), load(sums, more + lane)))


@compiled()
def blur(directions, chains, values):
    """Each row plus half of both neighbours, in one direction after the other, in place.

    `chains` lists rows that are next to each other one after the other, the last of each chain as its complement, and
    rows without a neighbour not at all. `directions` (D, 2) says from where to where each direction's are.
    """
    for direction in range(len(directions)):
        _blur_chains(directions[direction, 0], directions[direction, 1], chains, values)


@compiled()
def _blur_chains(start, stop, chains, values):
    """Those that begin between start and stop, where a chain ends before the former or it is the first."""
    width, at = values.shape[1], start
    while at < stop:
        end = min(at + BLOCK, stop)
        while element(chains, end - 1) >= 0:
            end += 1
        lane = 0
        while lane + 24 <= width:
            _blur_24(at, end, lane, chains, values)
            lane += 24
        while lane < width:
            _blur_8(at, end, lane, chains, values)
            lane += 8
        at = end


@compiled()
def _next_chain(at, first, chains):
    """The first place from `at` on where a chain begins or the list, which begins at `first`, ends."""
    while first < at < len(chains) and element(chains, at - 1) >= 0:
        at += 1
    return at


@compiled()
def _blur_24(first, end, lane, chains, values):
    """Whole chains. What links a row to the next is 0 after the last, so that nothing jumps there."""
    width, half, none = values.shape[1], values.dtype.type(0.5), values.dtype.type(0)
    a = b = c = broadcast(none)
    before = none
    vertex = element(chains, first)
    row = (vertex ^ (vertex >> 31)) * width + lane
    d, e, f = load(values, row), load(values, row + 8), load(values, row + 16)
    for k in range(first + 1, end + 1):
        after = none if vertex < 0 else half
        vertex = element(chains, min(k, end - 1))
        following = (vertex ^ (vertex >> 31)) * width + lane
        g, h, i = load(values, following), load(values, following + 8), load(values, following + 16)
        store(values, row, multiply_add(multiply_add(d, before, a), after, g))
        store(values, row + 8, multiply_add(multiply_add(e, before, b), after, h))
        store(values, row + 16, multiply_add(multiply_add(f, before, c), after, i))
        a, b, c, d, e, f, row, before = d, e, f, g, h, i, following, after


@compiled()
def _blur_8(first, end, lane, chains, values):
    """As `_blur_24`."""
    width, half, none = values.shape[1], values.dtype.type(0.5), values.dtype.type(0)
    last = broadcast(none)
    before = none
    vertex = element(chains, first)
    row = (vertex ^ (vertex >> 31)) * width + lane
    here = load(values, row)
    for k in range(first + 1, end + 1):
        after = none if vertex < 0 else half
        vertex = element(chains, min(k, end - 1))
        following = (vertex ^ (vertex >> 31)) * width + lane
        there = load(values, following)
        store(values, row, multiply_add(multiply_add(here, before, last), after, there))
        last, here, row, before = here, there, following, after


@compiled()
def rank_one_and_diagonal(matrix, left, right, diagonal):
    """Whether matrix = left^T right + diag(diagonal), each (1, L), as Potts compatibility or its transpose is."""
    num_labels = len(matrix)
    for by_row in (True, False):
        factor, one = (left, right) if by_row else (right, left)
        one[0, :num_labels] = 1
        holds = True
        for i in range(num_labels):
            other = 1 if i == 0 and num_labels > 1 else 0
            factor[0, i] = matrix[i, other] if by_row else matrix[other, i]
            diagonal[0, i] = matrix[i, i] - factor[0, i]
            for j in range(num_labels):
                holds &= j == i or (matrix[i, j] if by_row else matrix[j, i]) == factor[0, i]
            if not holds:
                break
        if holds:
            return True
    return False


@compiled()
def apply_matrix(start, stop, values, matrix, out):
    """out[v] = values[v] @ matrix, whose columns are padded and whose rows are not; `out` may be `values`."""
    width = values.shape[1]
    row = np.empty((1, width), values.dtype)
    for v in range(start, stop):
        for lane in range(0, width, 8):
            store(row, lane, load(values, v * width + lane))
        lane = 0
        while lane + 24 <= width:
            a = b = c = broadcast(values.dtype.type(0))
            for k in range(len(matrix)):
                w, at = element(row, k), k * width + lane
                a = multiply_add(a, w, load(matrix, at))
                b = multiply_add(b, w, load(matrix, at + 8))
                c = multiply_add(c, w, load(matrix, at + 16))
            store(out, v * width + lane, a)
            store(out, v * width + lane + 8, b)
            store(out, v * width + lane + 16, c)
            lane += 24
        while lane < width:
            a = broadcast(values.dtype.type(0))
            for k in range(len(matrix)):
                a = multiply_add(a, element(row, k), load(matrix, k * width + lane))
            store(out, v * width + lane, a)
            lane += 8


@compiled()
def apply_rank_one(start, stop, num_labels, values, left, right, diagonal, out):
    """out[v] = <values[v], left> * right + values[v] * diagonal; `out` may be `values`."""
    width, none = values.shape[1], values.dtype.type(0)
    for row in range(start * width, stop * width, width):
        last = keep_first(load(values, row + width - 8), num_labels - width + 8, none)
        total = multiply(last, load(left, width - 8))
        for lane in range(0, width - 8, 8):
            total = add(total, multiply(load(values, row + lane), load(left, lane)))
        product = reduce_add(total)
        for lane in range(0, width, 8):
            own = multiply(load(values, row + lane), load(diagonal, lane))
            store(out, row + lane, multiply_add(own, product, load(right, lane)))


@compiled()
def inner(start, stop, first, last, left, right, sums):
    """sums[c] = left^T right over the c-th chunk of the rows from first to last, the padding included."""
    width = left.shape[1]
    for chunk in range(start, stop):
        low, high = first + chunk * CHUNK, min(first + (chunk + 1) * CHUNK, last)
        sums[chunk] = 0
        for block in range(low, high, BLOCK):
            num_rows = min(BLOCK, high - block)
            for label in range(0, width, 8):
                for lane in range(0, width, 8):
                    _inner_8x8(block * width, num_rows, label, lane, left, right, (chunk * width + label) * width, sums)


@compiled()
def _inner_8x8(row, num_rows, label, lane, left, right, target, sums):
    """Eight labels by eight, which stay in registers."""
    width, to = left.shape[1], target + lane
    a, b, c = load(sums, to), load(sums, to + width), load(sums, to + 2 * width)
    d, e, f = load(sums, to + 3 * width), load(sums, to + 4 * width), load(sums, to + 5 * width)
    g, h = load(sums, to + 6 * width), load(sums, to + 7 * width)
    for _ in range(num_rows):
        at, values = row + label, load(right, row + lane)
        a = multiply_add(a, element(left, at), values)
        b = multiply_add(b, element(left, at + 1), values)
        c = multiply_add(c, element(left, at + 2), values)
        d = multiply_add(d, element(left, at + 3), values)
        e = multiply_add(e, element(left, at + 4), values)
        f = multiply_add(f, element(left, at + 5), values)
        g = multiply_add(g, element(left, at + 6), values)
        h = multiply_add(h, element(left, at + 7), values)
        row += width
    store(sums, to, a)
    store(sums, to + width, b)
    store(sums, to + 2 * width, c)
    store(sums, to + 3 * width, d)
    store(sums, to + 4 * width, e)
    store(sums, to + 5 * width, f)
    store(sums, to + 6 * width, g)
    store(sums, to + 7 * width, h)


@compiled()
def slice_rows(start, stop, rows, vertex_of_row, weights, table, energy, out):
    """Out = energy + what each pixel reads from its corners."""
    _slice_block(start, stop - start, rows, vertex_of_row, weights, table, energy, out, start)


@compiled()
def slice_softmax(start, stop, num_labels, rows, vertex_of_row, weights, table, energy, out):
    """Out, which may be `energy`, = softmax(-slice_rows), float32."""
    factors = np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        num_rows = min(BLOCK, stop - first)
        _slice_block(first, num_rows, rows, vertex_of_row, weights, table, energy, out, first)
        softmax_block(num_rows, num_labels, out[first:], factors)


@compiled()
def step(
    start, stop, num_labels, bands, runs, rows, vertex_of_row, slice_weights, table, energy, splat_weights, sums
):  # fmt: skip
    """A whole step in one pass over the pixels: the marginals are splatted and not kept, float32."""
    factors = np.empty(BLOCK, np.float32)
    block = np.empty((BLOCK, energy.shape[1]), np.float32)
    for band in range(start, stop):
        _clear(runs[band], sums)
        for first in range(bands[band], bands[band + 1], BLOCK):
            num_rows = min(BLOCK, bands[band + 1] - first)
            _slice_block(first, num_rows, rows, vertex_of_row, slice_weights, table, energy, block, 0)
            softmax_block(num_rows, num_labels, block, factors)
            _scatter_block(first, num_rows, rows, splat_weights, block, 0, sums)


@compiled()
def step_backward(
    start, stop, num_labels, bands, runs, rows, vertex_of_row,
    slice_weights, table, energy, splat_weights, grad_table, grad_energy, sums,
):  # fmt: skip
    """The adjoint of a whole step in one pass, float32: the marginals are computed again.

    Adds the gradient of the energy, which it also splats, to `grad_energy`.
    """
    factors = np.empty(BLOCK, np.float32)
    q = np.empty((BLOCK, energy.shape[1]), np.float32)
    grad = np.empty((BLOCK, energy.shape[1]), np.float32)
    nothing = np.zeros((1, energy.shape[1]), np.float32)
    for band in range(start, stop):
        _clear(runs[band], sums)
        for first in range(bands[band], bands[band + 1], BLOCK):
            num_rows = min(BLOCK, bands[band + 1] - first)
            _slice_block(first, num_rows, rows, vertex_of_row, slice_weights, table, energy, q, 0)
            softmax_block(num_rows, num_labels, q, factors)
            _slice_block(first, num_rows, rows, vertex_of_row, splat_weights, grad_table, nothing, grad, 0)
            softmax_backward(0, num_rows, num_labels, q, grad, grad)
            for lane in range(0, num_rows * q.shape[1], 8):
                at = first * q.shape[1] + lane
                store(grad_energy, at, add(load(grad_energy, at), load(grad, lane)))
            _scatter_block(first, num_rows, rows, slice_weights, grad, 0, sums)


# One function for each, not a higher-order one: numba caches a closure for its own process only.


@compiled(parallel=True)
def parallel_copy_rows(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        copy_rows(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_scatter(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        scatter(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_combine(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        combine(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_blur(bounds, directions, chains, values):
    for direction in range(len(directions)):
        first, length = directions[direction, 0], directions[direction, 1] - directions[direction, 0]
        for part in prange(len(bounds) - 1):
            start = _next_chain(first + np.int64(length * bounds[part]), first, chains)
            stop = _next_chain(first + np.int64(length * bounds[part + 1]), first, chains)
            _blur_chains(start, stop, chains, values)


@compiled(parallel=True)
def parallel_apply_matrix(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        apply_matrix(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_apply_rank_one(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        apply_rank_one(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_inner(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        inner(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_slice_rows(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_rows(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_slice_softmax(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        slice_softmax(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_step(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        step(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_step_backward(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        step_backward(bounds[part], bounds[part + 1], *arguments)
