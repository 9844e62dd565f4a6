"""The log of a training run: workers append lines to a file, and the driver shows them while it waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOG = "train.log"
_LINE_EVERY_S = 10.0


def log_line(run: str, text: str) -> None:
    """Append a line to the log of the run directory."""
    with (Path(run) / LOG).open("a") as file:
        file.write(f"{text}\n")


@contextmanager
def shown(run: str) -> Iterator[None]:
    """Print what is appended to the log. Ray would forward the workers' output with its own processes' noise."""
    log = Path(run) / LOG
    log.touch()
    done = threading.Event()

    def forward(file: TextIO) -> None:
        finished = False
        while not finished:
            finished = done.wait(0.5)
            print(file.read(), end="", flush=True)

    with log.open() as file:
        file.seek(0, os.SEEK_END)
        thread = threading.Thread(target=forward, args=(file,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class EpochLog:
    """Logs the mean losses of an epoch so far, every few seconds.

    Args:
        run: The run directory.
        epoch: The epoch in words, e.g. "epoch 1/30".
        num_steps: How many steps it has.
        num_workers: Images a step.
    """

    def __init__(self, run: str, epoch: str, num_steps: int, num_workers: int) -> None:
        self.run = run
        self.epoch = epoch
        self.num_steps = num_steps
        self.num_workers = num_workers
        self.sums: dict[str, float] = {}
        self.start = self.last = time.monotonic()

    def add(self, index: int, losses: Mapping[str, float]) -> None:
        """Take in the losses of step `index`."""
        self.sums = {name: self.sums.get(name, 0.0) + loss for name, loss in losses.items()}
        now = time.monotonic()
        if now - self.last > _LINE_EVERY_S:
            self.last = now
            means = {name: total / (index + 1) for name, total in self.sums.items()}
            rate = (index + 1) * self.num_workers / (now - self.start)
            step = f"{self.epoch}, step {index + 1}/{self.num_steps}"
            log_line(self.run, f"{step}: {in_words(means)}, {rate:.2f} images/s")


def in_words(losses: Mapping[str, float]) -> str:
    """Losses by name, as a line of the log has them."""
    return ", ".join(f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in losses.items())
