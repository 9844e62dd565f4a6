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
    """Yield the items and say how many of `total` there have been, e.g. "evaluated images: 40 of 120"."""
    if sys.stdout.isatty():
        yield from track(items, what, total)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", flush=True)
