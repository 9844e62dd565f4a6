"""Progress of a long loop: a bar on a terminal, a plain line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn, track

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


def byte_progress(chunks: Iterable[bytes], done: int, total: int | None, what: str) -> Iterator[bytes]:
    """Yield the chunks of a file of `total` bytes, if that is known, of which `done` were there, as `progress` does."""
    if sys.stdout.isatty():
        columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(what, total=total, completed=done)
            for chunk in chunks:
                yield chunk
                bar.advance(task, len(chunk))
        return
    first, start = done, time.monotonic()
    last = start
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        now = time.monotonic()
        if now - last > LINE_EVERY_S:
            last = now
            rate = (done - first) / (now - start)
            left = "" if total is None else f", about {(total - done) / rate / 60:.0f} min left"
            size = "" if total is None else f" of {total / 1e6:.0f}"
            print(f"{what}: {done / 1e6:.0f}{size} MB, {rate / 1e6:.1f} MB a second{left}", flush=True)
