"""The compiled loops: building. Each works on a range of rows."""

from __future__ import annotations

import numpy as np
from numba import prange

from instseg.lattice.cpu.compile import compiled
from instseg.lattice.cpu.simd import element, prefetch, set_element

_EMPTY = np.int64(-1)  # keys are not negative
_AHEAD = 16  # keys by which memory is asked for in advance
_BLOCK = 128  # points that a loop carries through all its steps in the first-level cache


@compiled()
def _new_buffers(num_corners, dtype):
    """What `_embed` works in."""
    shape = num_corners, _BLOCK
    return (
        np.empty(shape, dtype),
        np.empty(shape, dtype),
        np.empty(shape, dtype),
        np.empty(_BLOCK, dtype),
        np.empty(shape, np.int32),
        np.empty(_BLOCK, np.int32),
        np.empty(_BLOCK, np.int64),
    )


@compiled()
def _embed(first, n, features, scales, low, strides, buffers, weights, keys):
    """Barycentric coordinates of n points, and one key for each corner of their simplices; `torch_backend` says how.

    The same operations on a block of points at a time, so that they vectorise; the arithmetic is not reassociated.
    """
    elevated, residual, base, total, rank, surplus, key = buffers
    num_features = features.shape[1]
    num_corners = num_features + 1
    zero, one, corners = features.dtype.type(0), features.dtype.type(1), features.dtype.type(num_corners)
    # Adding and subtracting this rounds to the nearest integer, ties to even.
    rounder = features.dtype.type(1.5 * 2.0**23 if features.itemsize == 4 else 1.5 * 2.0**52)
    for p in range(n):
        total[p] = zero
        surplus[p] = 0
        key[p] = 0
    for index in range(num_features, 0, -1):
        multiple = features.dtype.type(index)
        for p in range(n):
            scaled = features[first + p, index - 1] * scales[index - 1]
            elevated[index, p] = total[p] - multiple * scaled
            total[p] += scaled
    for p in range(n):
        elevated[0, p] = total[p]
    for j in range(num_corners):
        for p in range(n):
            step = (elevated[j, p] / corners + rounder) - rounder
            surplus[p] += np.int32(step)
            base[j, p] = step * corners
            residual[j, p] = elevated[j, p] - base[j, p]
            rank[j, p] = 0
    for a in range(num_corners):
        for b in range(a + 1, num_corners):
            for p in range(n):
                smaller = np.int32(residual[a, p] < residual[b, p])
                rank[a, p] += smaller
                rank[b, p] += np.int32(1) - smaller
    for j in range(num_corners):
        for p in range(n):
            shifted = rank[j, p] + surplus[p]
            wrap = np.int32(shifted < 0) - np.int32(shifted >= num_corners)
            rank[j, p] = shifted + wrap * np.int32(num_corners)
            base[j, p] += features.dtype.type(wrap) * corners
            residual[j, p] = (elevated[j, p] - base[j, p]) / corners
    for turn in range(num_corners):  # odd-even transposition sort, largest first
        for j in range(turn & 1, num_corners - 1, 2):
            for p in range(n):
                x, y = residual[j, p], residual[j + 1, p]
                residual[j, p] = max(x, y)
                residual[j + 1, p] = min(x, y)
    for j in range(num_features):
        for p in range(n):
            key[p] += (np.int64(base[j, p]) - low[j]) * strides[j]
    for p in range(n):
        weights[first + p, 0] = residual[num_features, p] - residual[0, p] + one
        keys[p, 0] = key[p]
    for k in range(1, num_corners):
        for j in range(num_features):
            for p in range(n):
                dropped = np.int64(rank[j, p] == num_corners - k)
                key[p] += strides[j] - num_corners * strides[j] * dropped
        for p in range(n):
            keys[p, k] = key[p]
            weights[first + p, k] = residual[num_features - k, p] - residual[num_corners - k, p]


@compiled()
def _home(key, table):
    """The slot of `table` from which a key is searched."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(len(table) - 1))


@compiled()
def _find(key, table):
    """The slot of an open-addressing table (S, 2), of keys and their numbers, where `key` is or belongs.

    Insertion stands where it is needed, three times: as a function of its own it makes numbering four times as slow.

    A slot holds the key, or nothing, or another key, and a processor cannot predict which; so both conditions are one
    number, to be tested by one jump: x | -x is negative unless x is 0.
    """
    slot = _home(key, table)
    while True:
        held = element(table, 2 * slot)
        differs, filled = held ^ key, held ^ _EMPTY
        if (differs | -differs) & (filled | -filled) >= 0:
            return slot
        slot = (slot + 1) & (len(table) - 1)


@compiled()
def table_size(capacity):
    """The power of two of which `capacity` keys fill two thirds or less."""
    size = 1 << 10
    while 2 * size < 3 * capacity:
        size *= 2
    return size


@compiled()
def _grow(unique, count, room):
    """A table of the first `count` keys of `unique`, with room for as many again and for `room` more."""
    table = np.full((table_size(2 * count + room), 2), _EMPTY)
    for number in range(count):
        table[_find(unique[number], table)] = unique[number], number
    return table


@compiled()
def number_corners(start, stop, bands, features, scales, low, strides, parts, tables, weights, numbers, unique, runs):
    """Weights of each point in the corners of its simplex, which are numbered in the order of first touch in a band.

    `unique` receives the distinct keys of each band in `runs` (B, 2), from where to where. Both it and the `tables`,
    one for each of the `parts`, are the caller's: memory that a thread gets and returns is slow.
    """
    num_corners = features.shape[1] + 1
    buffers = _new_buffers(num_corners, features.dtype)
    keys = np.empty((_BLOCK, num_corners), np.int64)
    table, end = tables[np.searchsorted(parts, start)], bands[start] * num_corners
    for band in range(start, stop):
        of_band, count = unique[end:], 0
        table[:] = _EMPTY
        for first in range(bands[band], bands[band + 1], _BLOCK):
            n = min(_BLOCK, bands[band + 1] - first)
            _embed(first, n, features, scales, low, strides, buffers, weights, keys)
            for p in range(n):
                for c in range(num_corners):
                    key = keys[p, c]
                    slot = _find(key, table)
                    if table[slot, 0] != key:
                        of_band[count] = key
                        table[slot] = key, count
                        count += 1
                    numbers[first + p, c] = table[slot, 1]
            if 3 * (count + _BLOCK * num_corners) > 2 * len(table):
                table = _grow(of_band, count, _BLOCK * num_corners)
        runs[band] = end, end + count
        end += count


@compiled()
def merge_bands(keys, runs, table, unique):
    """Number the distinct ones among the `keys` of all bands, which are in `runs` (B, 2), in order.

    Returns:
        How many there were before each band, and at the end; the number of each band's keys, one band after the other.
        `table`, of `table_size` of all keys, and `unique` receive the distinct keys.
    """
    table[:] = _EMPTY
    numbers = np.empty((runs[:, 1] - runs[:, 0]).sum(), np.int32)
    firsts = np.zeros(len(runs) + 1, np.int64)
    count = at = 0
    for band in range(len(runs)):
        for k in range(runs[band, 0], runs[band, 1]):
            if k + _AHEAD < runs[band, 1]:
                prefetch(table, 2 * _home(keys[k + _AHEAD], table))
            key = keys[k]
            slot = _find(key, table)
            if table[slot, 0] != key:
                unique[count] = key
                table[slot] = key, count
                count += 1
            numbers[at] = table[slot, 1]
            at += 1
        firsts[band + 1] = count
    return firsts, numbers


@compiled()
def add_ring(steps, table, unique, count):
    """Add the vertices next to those that a point touches; the table and the count with them."""
    for vertex in range(count):
        for step in steps:
            for sign in (-1, 1):
                key = unique[vertex] + sign * step
                slot = _find(key, table)
                if table[slot, 0] != key:
                    unique[count] = key
                    table[slot] = key, count
                    count += 1
        if 3 * (count + 2 * len(steps)) > 2 * len(table):
            table = _grow(unique, count, 2 * len(steps))
    return table, count


@compiled()
def find_chains(start, stop, steps, table, unique, first_vertex, links, flags, first_links, chains, lengths):
    """For each direction from start to stop its chains of vertices one step apart, see `filter_loops.blur`.

    `chains` (C+1, M) receives them and `lengths` (C+1,) how many vertices are in them; the rest is scratch.
    """
    count = chains.shape[1]
    after, starts, firsts = links[start], flags[start], first_links[start]  # the first of the flags is of no vertex
    for direction in range(start, stop):
        starts[:] = True
        for vertex in range(count):
            if vertex + _AHEAD < count:
                prefetch(table, 2 * _home(unique[vertex + _AHEAD] + steps[direction], table))
            after[vertex] = table[_find(unique[vertex] + steps[direction], table), 1]  # of an empty slot: -1
            starts[after[vertex] + 1] = False
        num_chains = at = 0
        for vertex in range(count):  # no jump here either
            firsts[num_chains] = vertex
            num_chains += starts[vertex + 1] & (after[vertex] >= 0)
        for chain in range(num_chains):
            link = firsts[chain]
            while link >= 0:
                chains[direction, at] = link + first_vertex
                at += 1
                link = after[link]
            chains[direction, at - 1] = ~chains[direction, at - 1]
        lengths[direction] = at


@compiled()
def place_rows(numbers, counts, firsts, first_vertex, num_spilled, spilled):
    """From the vertices of each band's numbers to rows: the vertex's own for its first band, else a spilled one.

    The latter, counted from `num_spilled`, are given as complements; `spilled` receives their vertices.

    Returns:
        Where each band's spilled rows start, and where the last one's end.
    """
    bounds = np.empty(len(counts) + 1, np.int64)
    bounds[0] = row = num_spilled
    at = 0
    for band in range(len(counts)):
        for _ in range(counts[band]):
            vertex = numbers[at] + np.int32(first_vertex)
            if numbers[at] < firsts[band]:
                spilled[row - num_spilled] = vertex
                numbers[at] = ~row
                row += 1
            else:
                numbers[at] = vertex
            at += 1
        bounds[band + 1] = row
    return bounds


@compiled()
def sort_by_vertex(vertices, offsets):
    """The stable order (S,) that sorts `vertices`; `offsets` (M+1,) say where each one starts."""
    places = offsets[:-1].copy()
    order = np.empty(len(vertices), np.int32)
    for index in range(len(vertices)):
        order[places[vertices[index]]] = index
        places[vertices[index]] += 1
    return order


@compiled()
def renumber(start, stop, bands, first_numbers, row_of_number, num_vertices, rows):
    """From numbers in a band to rows, see `place_rows`; spilled rows stand behind the vertices'."""
    for band in range(start, stop):
        first_number = first_numbers[band]
        for i in range(bands[band], bands[band + 1]):
            for c in range(rows.shape[1]):
                row = row_of_number[first_number + rows[i, c]]
                rows[i, c] = row if row >= 0 else num_vertices + ~row


@compiled()
def normalize(start, stop, rows, vertex_of_row, first_columns, table, symmetric, weights, out):
    """Out = each point's weights divided by its norm, what it reads from `table` (R, 1 padded), kernel by kernel.

    With `symmetric` by its square root. `out` may be `weights`.
    """
    step, num_corners = table.shape[1], rows.shape[1]
    one = weights.dtype.type(1)
    for corner in range(start * num_corners, stop * num_corners, num_corners):
        for kernel in range(len(first_columns) - 1):
            first, last = corner + first_columns[kernel], corner + first_columns[kernel + 1]
            norm = weights.dtype.type(0)
            for k in range(first, last):
                norm += element(weights, k) * element(table, element(vertex_of_row, element(rows, k)) * step)
            factor = one / (np.sqrt(norm) if symmetric else norm)
            for k in range(first, last):
                set_element(out, k, element(weights, k) * factor)


@compiled(parallel=True)
def parallel_number_corners(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        number_corners(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_find_chains(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        find_chains(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_renumber(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        renumber(bounds[part], bounds[part + 1], *arguments)


@compiled(parallel=True)
def parallel_normalize(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        normalize(bounds[part], bounds[part + 1], *arguments)
