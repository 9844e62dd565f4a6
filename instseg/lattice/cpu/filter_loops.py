"""The compiled loops: filters, and whole mean-field steps.

Values on the vertices stand in rows of labels, padded to whole vectors; what is in the padding never reaches a label.
Pixels come in bands, whose number depends on the image alone. A vertex has the row of its own number, which the first
band that touches it adds to; each further band adds to a row of its own behind them, and `combine` adds those to the
vertex's in order. So nothing depends on which thread took which band.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from instseg.lattice.cpu.compile import compiled
from instseg.lattice.cpu.simd import add, broadcast, element, flush, load, multiply_add, store
from instseg.lattice.cpu.softmax_loops import BLOCK, softmax_backward, softmax_block


class Maps(NamedTuple):
    """How pixels read from the vertices and add to them; of a `NumbaLattice`, which says what these are."""

    bands: np.ndarray
    runs: np.ndarray
    rows: np.ndarray
    vertex_of_row: np.ndarray
    splat_weights: np.ndarray
    slice_weights: np.ndarray


@compiled
def _slice_block(first, num_rows, maps, table, energy, out):
    """out[p] = energy[first + p] + sum over the corners of weight * table[vertex].

    A single row of `energy` or of `table` stands for all.
    """
    rows, vertex_of_row, weights = maps.rows, maps.vertex_of_row, maps.slice_weights
    width, num_corners = out.shape[1], rows.shape[1]
    energy_step = width if len(energy) > 1 else 0
    table_step = width if len(table) > 1 else 0
    for p in range(num_rows):
        corner, row, to = (first + p) * num_corners, (first + p) * energy_step, p * width
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


@compiled
def _scatter_block(first, num_rows, maps, values, source, sums):
    """sums[row of the corner] += weight * values[source + p]; a single row of `values` stands for all."""
    rows, weights = maps.rows, maps.splat_weights
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


@compiled
def _clear(runs, sums):
    """Zero in the `runs` (2K, 2) of rows, from first to last."""
    width, zero = sums.shape[1], broadcast(sums.dtype.type(0))
    for run in range(len(runs)):
        for at in range(runs[run, 0] * width, runs[run, 1] * width, 8):
            store(sums, at, zero)


@compiled
def copy_rows(start, stop, values, out):
    """Row by row; out[i] = values[i]; the padding becomes 0, as what lies there may be denormal."""
    num_labels = values.shape[1]
    for i in range(start, stop):
        for label in range(num_labels):
            out[i, label] = values[i, label]
        for label in range(num_labels, out.shape[1]):
            out[i, label] = 0


@compiled
def scatter(start, stop, maps, values, sums):
    """Each band's sums over its pixels of weight * value, in the band's rows."""
    for band in range(start, stop):
        first = maps.bands[band]
        _clear(maps.runs[band], sums)
        _scatter_block(first, maps.bands[band + 1] - first, maps, values, first, sums)


@compiled
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


@compiled
def slice_rows(start, stop, maps, table, energy, out):
    """Out = energy + what each pixel reads from its corners."""
    _slice_block(start, stop - start, maps, table, energy, out[start:])


@compiled
def slice_softmax(start, stop, num_labels, maps, table, energy, out):
    """Out, which may be `energy`, = softmax(-slice_rows), float32."""
    factors = np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        num_rows = min(BLOCK, stop - first)
        _slice_block(first, num_rows, maps, table, energy, out[first:])
        softmax_block(num_rows, num_labels, out[first:], factors)


@compiled
def step(start, stop, num_labels, maps, table, energy, sums):
    """A whole step in one pass over the pixels: the marginals are splatted and not kept, float32."""
    factors = np.empty(BLOCK, np.float32)
    q = np.empty((BLOCK, energy.shape[1]), np.float32)
    for band in range(start, stop):
        _clear(maps.runs[band], sums)
        for first in range(maps.bands[band], maps.bands[band + 1], BLOCK):
            num_rows = min(BLOCK, maps.bands[band + 1] - first)
            _slice_block(first, num_rows, maps, table, energy, q)
            softmax_block(num_rows, num_labels, q, factors)
            _scatter_block(first, num_rows, maps, q, 0, sums)


@compiled
def step_backward(start, stop, num_labels, maps, adjoint, table, grad_table, energy, grad_energy, sums):
    """The adjoint of a whole step in one pass, float32: the marginals are computed again.

    Adds the gradient of the energy, which it also splats, to `grad_energy`.
    """
    factors = np.empty(BLOCK, np.float32)
    q = np.empty((BLOCK, energy.shape[1]), np.float32)
    grad = np.empty((BLOCK, energy.shape[1]), np.float32)
    nothing = np.zeros((1, energy.shape[1]), np.float32)
    for band in range(start, stop):
        _clear(maps.runs[band], sums)
        for first in range(maps.bands[band], maps.bands[band + 1], BLOCK):
            num_rows = min(BLOCK, maps.bands[band + 1] - first)
            _slice_block(first, num_rows, maps, table, energy, q)
            softmax_block(num_rows, num_labels, q, factors)
            _slice_block(first, num_rows, adjoint, grad_table, nothing, grad)
            softmax_backward(0, num_rows, num_labels, q, grad, grad)
            for lane in range(0, num_rows * q.shape[1], 8):
                at = first * q.shape[1] + lane
                store(grad_energy, at, add(load(grad_energy, at), load(grad, lane)))
            _scatter_block(first, num_rows, adjoint, grad, 0, sums)
