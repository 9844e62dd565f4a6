"""The compiled loops of `lattice_numba`: building. Each works on a range of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

_EMPTY = np.int64(-1)  # keys are not negative
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
def _find(key, keys):
    """The slot of an open-addressing table that holds `key`, or the empty one where it belongs."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mask = np.int64(len(keys) - 1)
    slot = np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))
    while keys[slot] != key and keys[slot] != _EMPTY:
        slot = (slot + 1) & mask
    return slot


@_compiled()
def _new_table(size):
    return np.full(size, _EMPTY, np.int64), np.empty(size, np.int32)


@_compiled()
def _add(key, slot, table, unique, count):
    """The table with `key`, whose number is `count`, also noted in `unique`; it grows when half full."""
    keys, numbers = table
    unique[count] = key
    if 2 * count >= len(keys):
        keys, numbers = _new_table(4 * len(keys))
        for vertex in range(count):
            slot = _find(unique[vertex], keys)
            keys[slot] = unique[vertex]
            numbers[slot] = vertex
        slot = _find(key, keys)
    keys[slot] = key
    numbers[slot] = count
    return keys, numbers


@_compiled()
def number_vertices(start, stop, bands, first_numbers, keys, vertices, unique, counts):
    """Number the keys of each band of points in the order of their first touch, from the band's first number.

    `unique` (B, U) receives the distinct keys of each band and `counts` (B,) how many they are.
    """
    for band in range(start, stop):
        table, count = _new_table(1 << 13), 0
        for i in range(bands[band], bands[band + 1]):
            for c in range(keys.shape[1]):
                key = keys[i, c]
                if i > bands[band] and keys[i - 1, c] == key:  # points next to each other share most corners
                    vertices[i, c] = vertices[i - 1, c]
                    continue
                slot = _find(key, table[0])
                if table[0][slot] != key:
                    table = _add(key, slot, table, unique[band], count)
                    vertices[i, c] = count + first_numbers[band]
                    count += 1
                else:
                    vertices[i, c] = table[1][slot] + first_numbers[band]
        counts[band] = count


@_compiled()
def merge_vertices(keys, capacity):
    """Number the distinct ones among `keys` in order.

    Returns:
        Hash table, distinct keys with room for `capacity`, their count, and the number of each of `keys`.
    """
    table = _new_table(1 << 13)
    unique = np.empty(capacity, np.int64)
    numbers = np.empty(len(keys), np.int32)
    count = 0
    for k in range(len(keys)):
        slot = _find(keys[k], table[0])
        if table[0][slot] == keys[k]:
            numbers[k] = table[1][slot]
        else:
            table = _add(keys[k], slot, table, unique, count)
            numbers[k] = count
            count += 1
    return table, unique, count, numbers


@_compiled()
def add_ring(steps, table, unique, count):
    """Add the vertices next to those that a point touches; the table and the count with them."""
    for vertex in range(count):
        for step in steps:
            for sign in (-1, 1):
                key = unique[vertex] + sign * step
                slot = _find(key, table[0])
                if table[0][slot] != key:
                    table = _add(key, slot, table, unique, count)
                    count += 1
    return table, count


@_compiled()
def find_neighbors(start, stop, steps, slot_keys, slot_numbers, unique, first_vertex, neighbors):
    """(C+1, 2, M): the vertices at -1 and +1 step in each direction, -1 where there is none."""
    for vertex in range(start, stop):
        for direction in range(len(steps)):
            for side in range(2):
                key = unique[vertex] + (2 * side - 1) * steps[direction]
                slot = _find(key, slot_keys)
                found = slot_keys[slot] == key
                neighbors[direction, side, vertex] = slot_numbers[slot] + first_vertex if found else -1


@_compiled(parallel=True)
def parallel_embed(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        embed(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_number_vertices(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        number_vertices(bounds[part], bounds[part + 1], *arguments)


@_compiled(parallel=True)
def parallel_find_neighbors(bounds, *arguments):
    for part in prange(len(bounds) - 1):
        find_neighbors(bounds[part], bounds[part + 1], *arguments)
