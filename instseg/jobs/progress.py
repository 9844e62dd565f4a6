"""Progress of a long loop: a bar on a terminal, a plain line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 10.0
_SPEED_OVER_S = 600.0  # a shard may take minutes; of one in rich's own 30 seconds it would make no speed
Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield the items and say how many of `total` there have been, how fast, and how long the others will take."""
    if sys.stdout.isatty():
        columns = (
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, speed_estimate_period=_SPEED_OVER_S) as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.advance(task)
        return
    start = last = time.monotonic()
    before = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > LINE_EVERY_S:
            rate = (done - before) / (now - start)
            speed = f", {rate:.2f} a second, {time_left((total - done) / rate)}" if before else ""
            print(f"{what}: {done} of {total}{speed}", flush=True)
            last = now
            if not before:  # workers had to start, and what an earlier run had finished comes at once: no measure
                before, start = done, now


def time_left(seconds: float) -> str:
    """In words, to the minute where there are more than two."""
    return f"about {seconds / 60:.0f} min left" if seconds > 120 else f"about {seconds:.0f} s left"


def byte_progress(chunks: Iterable[bytes], done: int, total: int | None, what: str) -> Iterator[bytes]:
    """Yield the chunks of a file of `total` bytes, if that is known, of which `done` were there, as `progress` does."""
    if sys.stdout.isatty():
        columns = (
            *Progress.get_default_columns()[:2],
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
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
            left = "" if total is None else f", {time_left((total - done) / rate)}"
            size = "" if total is None else f" of {total / 1e6:.0f}"
            print(f"{what}: {done / 1e6:.0f}{size} MB, {rate / 1e6:.1f} MB a second{left}", flush=True)
