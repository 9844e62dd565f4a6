"""The compiled loops of `lattice_numba`: building. Each works on a range of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

_EMPTY = np.int32(-1)
_BLOCK = 128  # points that a loop carries through all its steps in the first-level cache


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return njit(nogil=True, cache=True, **options)


@_compiled()
def embed(start, stop, features, scales, low, strides, weights, keys):
    """Barycentric coordinates, and one key for each corner of each point's simplex; `lattice_torch` says how.

    The same operations on a block of points at a time, so that they vectorise; the arithmetic is not reassociated.
    """
    num_features = features.shape[1]
    num_corners = num_features + 1
    zero, one, corners = features.dtype.type(0), features.dtype.type(1), features.dtype.type(num_corners)
    # Adding and subtracting this rounds to the nearest integer, ties to even.
    rounder = features.dtype.type(1.5 * 2.0**23 if features.itemsize == 4 else 1.5 * 2.0**52)
    elevated = np.empty((num_corners, _BLOCK), features.dtype)
    residual = np.empty((num_corners, _BLOCK), features.dtype)
    base = np.empty((num_corners, _BLOCK), features.dtype)
    rank = np.empty((num_corners, _BLOCK), np.int32)
    surplus = np.empty(_BLOCK, np.int32)
    total = np.empty(_BLOCK, features.dtype)
    key = np.empty(_BLOCK, np.int64)
    for first in range(start, stop, _BLOCK):
        n = min(_BLOCK, stop - first)
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
            keys[first + p, 0] = key[p]
        for k in range(1, num_corners):
            for j in range(num_features):
                for p in range(n):
                    dropped = np.int64(rank[j, p] == num_corners - k)
                    key[p] += strides[j] - num_corners * strides[j] * dropped
            for p in range(n):
                keys[first + p, k] = key[p]
                weights[first + p, k] = residual[num_features - k, p] - residual[num_corners - k, p]


@_compiled()
def _find(key, table, unique):
    """The slot of an open-addressing table that holds the number of `key`, or the empty one where it belongs."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mask = np.int64(len(table) - 1)
    slot = np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))
    while table[slot] != _EMPTY and unique[table[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@_compiled()
def _grow(table, unique, count):
    larger = np.full(2 * len(table), _EMPTY, np.int32)
    keys = np.empty(len(larger) // 2, np.int64)
    keys[:count] = unique[:count]
    for vertex in range(count):
        larger[_find(keys[vertex], larger, keys)] = vertex
    return larger, keys


@_compiled()
def _find_or_add(key, table, unique, count):
    """The number of `key`, and the table with it."""
    slot = _find(key, table, unique)
    if table[slot] != _EMPTY:
        return table[slot], table, unique, count
    if count == len(unique):
        table, unique = _grow(table, unique, count)
        slot = _find(key, table, unique)
    table[slot] = count
    unique[count] = key
    return np.int32(count), table, unique, count + 1


@_compiled()
def number_vertices(start, stop, keys, vertices):
    """Number the keys of some points in the order of their first touch: hash table, distinct keys, their count."""
    table = np.full(1 << 12, _EMPTY, np.int32)
    unique = np.empty(len(table) // 2, np.int64)
    count = 0
    for i in range(start, stop):
        for c in range(keys.shape[1]):
            if i > start and keys[i - 1, c] == keys[i, c]:  # points next to each other share most corners
                vertices[i, c] = vertices[i - 1, c]
                continue
            slot = _find(keys[i, c], table, unique)
            if table[slot] == _EMPTY:
                if count == len(unique):
                    table, unique = _grow(table, unique, count)
                    slot = _find(keys[i, c], table, unique)
                table[slot] = count
                unique[count] = keys[i, c]
                count += 1
            vertices[i, c] = table[slot]
    return table, unique, count


@_compiled()
def merge_vertices(keys, table, unique, count):
    """Add the distinct keys of further points, in order; and the number that each has now."""
    mapping = np.empty(len(keys), np.int32)
    for k in range(len(keys)):
        mapping[k], table, unique, count = _find_or_add(keys[k], table, unique, count)
    return table, unique, count, mapping


@_compiled()
def renumber(start, stop, mapping, first_vertex, vertices):
    """Replace the numbers of a part of the points by those of the whole."""
    for i in range(start, stop):
        for c in range(vertices.shape[1]):
            vertices[i, c] = mapping[vertices[i, c]] + first_vertex


@_compiled()
def add_ring(steps, table, unique, count):
    """Add the vertices next to those that a point touches."""
    for vertex in range(count):
        for step in steps:
            for key in (unique[vertex] - step, unique[vertex] + step):
                _, table, unique, count = _find_or_add(key, table, unique, count)
    return table, unique, count


@_compiled()
def find_neighbors(start, stop, steps, table, unique, first_vertex, neighbors):
    """(C+1, 2, M): the vertices at -1 and +1 step in each direction, -1 where there is none."""
    for vertex in range(start, stop):
        for direction in range(len(steps)):
            for side in range(2):
                step = steps[direction] if side else -steps[direction]
                found = table[_find(unique[vertex] + step, table, unique)]
                neighbors[direction, side, vertex] = found if found == _EMPTY else found + first_vertex


@_compiled()
def count_vertices(start, stop, bounds, vertices, counts):
    """counts[part, v] = how many corners of a part of the points are vertex v."""
    for part in range(start, stop):
        for i in range(bounds[part], bounds[part + 1]):
            for c in range(vertices.shape[1]):
                counts[part, vertices[i, c]] += 1


@_compiled()
def offsets_of_counts(counts):
    """Where each vertex's run starts; `counts` becomes where each part's share of it starts."""
    offsets = np.empty(counts.shape[1] + 1, np.int32)
    position = np.int32(0)
    for v in range(counts.shape[1]):
        offsets[v] = position
        for part in range(counts.shape[0]):
            share = counts[part, v]
            counts[part, v] = position
            position += share
    offsets[-1] = position
    return offsets


@_compiled()
def place_by_vertex(start, stop, bounds, positions, vertices, weights, points, sorted_weights):
    """Write each corner of a part of the points to its vertex's run."""
    for part in range(start, stop):
        for i in range(bounds[part], bounds[part + 1]):
            for c in range(vertices.shape[1]):
                position = positions[part, vertices[i, c]]
                positions[part, vertices[i, c]] = position + 1
                points[position] = i
                sorted_weights[position] = weights[i, c]
