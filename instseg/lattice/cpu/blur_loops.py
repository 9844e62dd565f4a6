"""The compiled loops: blurring."""

from __future__ import annotations

from instseg.lattice.cpu.compile import compiled
from instseg.lattice.cpu.simd import broadcast, element, load, multiply_add, store

_BLOCK = 64  # rows that a loop carries through all its steps in the first-level cache


@compiled
def blur(start, stop, first, chains, values):
    """Each row plus half of both neighbours in one direction, in place.

    `chains` lists rows that are next to each other one after the other, the last of each chain as its complement, and
    rows without a neighbour not at all. Those of this direction begin at `first`. This takes the chains that begin
    between first + start and first + stop.
    """
    width, at, stop = (
        values.shape[1],
        _next_chain(first + start, first, chains),
        _next_chain(first + stop, first, chains),
    )
    while at < stop:
        end = min(at + _BLOCK, stop)
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


@compiled
def _next_chain(at, first, chains):
    """The first place from `at` on where a chain begins or the list, which begins at `first`, ends."""
    while first < at < len(chains) and element(chains, at - 1) >= 0:
        at += 1
    return at


@compiled
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


@compiled
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
