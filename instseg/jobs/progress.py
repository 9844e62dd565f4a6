"""Progress of a long loop: a bar on a terminal, a plain line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import track

LINE_EVERY_S = 10.0
Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield the items and say how many of `total` there have been, how fast, and how long the others will take."""
    if sys.stdout.isatty():
        yield from track(items, what, total)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > LINE_EVERY_S:
            last = now
            rate, minutes = done / (now - start), (total - done) * (now - start) / done / 60
            print(f"{what}: {done} of {total}, {rate:.2f} a second, about {minutes:.0f} min left", flush=True)
