"""The compiled loops: products with matrices over the labels."""

from __future__ import annotations

import numpy as np

from instseg.lattice.cpu.compile import compiled
from instseg.lattice.cpu.simd import (
    add,
    broadcast,
    element,
    keep_first,
    load,
    multiply,
    multiply_add,
    reduce_add,
    store,
)

CHUNK = 1 << 13  # rows that `inner` adds up before it starts a new sum
_BLOCK = 64  # rows of it that stay in the first-level cache


@compiled
def rank_one_and_diagonal(matrix, factors):
    """Whether matrix = left^T right + diag(diagonal), as Potts compatibility or its transpose is.

    `factors` (3, 1, L padded with 0) receives left, right and diagonal.
    """
    left, right, diagonal, num_labels = factors[0], factors[1], factors[2], len(matrix)
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


@compiled
def apply_matrix(start, stop, matrix, values, out):
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


@compiled
def apply_rank_one(start, stop, num_labels, factors, values, out):
    """out[v] = <values[v], left> * right + values[v] * diagonal, see above; `out` may be `values`."""
    left, right, diagonal = factors[0], factors[1], factors[2]
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


@compiled
def inner(start, stop, first, last, left, right, sums):
    """sums[c] = left^T right over the c-th chunk of the rows from first to last, the padding included."""
    width = left.shape[1]
    for chunk in range(start, stop):
        low, high = first + chunk * CHUNK, min(first + (chunk + 1) * CHUNK, last)
        sums[chunk] = 0
        for block in range(low, high, _BLOCK):
            num_rows = min(_BLOCK, high - block)
            for label in range(0, width, 8):
                for lane in range(0, width, 8):
                    _inner_8x8(block * width, num_rows, label, lane, left, right, (chunk * width + label) * width, sums)


@compiled
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
