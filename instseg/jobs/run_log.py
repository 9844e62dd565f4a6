"""Lines of a training run, which its processes on any node send to the driver, and the driver prints."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from instseg.jobs.progress import LINE_EVERY_S, time_left

_POLL_S = 0.5


class RunLog:
    """The way to the driver; may be sent to other processes. `shown` makes it."""

    def __init__(self, lines: Any) -> None:
        self._lines = lines

    def line(self, text: str) -> None:
        """Send a line; returns when it is where the driver looks."""
        ray.get(self._lines.add.remote(text))

    def line_soon(self, text: str) -> None:
        """Send a line, and do not wait."""
        self._lines.add.remote(text)


class _Lines:
    """The actor: lines that the driver has not printed yet."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, text: str) -> None:
        self._lines.append(text)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken


@contextmanager
def shown() -> Iterator[RunLog]:
    """Print what is sent, for as long as the context lasts.

    Ray would forward the workers' output with its own processes' noise, and a file would need a disk in common.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lines: Any = ray.remote(num_cpus=0)(_Lines).options(scheduling_strategy=here).remote()  # pyright: ignore
    done = threading.Event()

    def forward() -> None:
        finished = False
        while not finished:
            finished = done.wait(_POLL_S)
            for line in ray.get(lines.take.remote()):
                print(line, flush=True)

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        yield RunLog(lines)
    finally:
        done.set()
        thread.join()
        ray.kill(lines)


class EpochLog:
    """Sends a line every few seconds: mean losses of an epoch so far, speed, waiting for data, time left.

    Args:
        log: The way to the driver.
        epoch: From 0.
        num_epochs: Of the run.
        num_steps: Of an epoch.
        batch_size: Images a step.
        first: Steps of the epoch that were taken before, by a run that is continued.
    """

    def __init__(
        self, log: RunLog, epoch: int, num_epochs: int, num_steps: int, batch_size: int, first: int = 0
    ) -> None:
        self.log = log
        self.epoch = epoch
        self.num_epochs = num_epochs
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.first = first
        self.num_done = 0
        self.sums: dict[str, float] = {}
        self.wait_ms = 0.0
        self.start = self.last = time.monotonic()

    def add(self, losses: Mapping[str, float], wait_ms: float) -> None:
        """Take in the losses of the next step, and how long it waited for its images."""
        self.num_done += 1
        self.sums = {name: self.sums.get(name, 0.0) + loss for name, loss in losses.items()}
        self.wait_ms += wait_ms
        now = time.monotonic()
        if now - self.last > LINE_EVERY_S:
            self.last = now
            self.log.line_soon(self._line(now - self.start))

    def _line(self, seconds: float) -> str:
        means = {name: total / self.num_done for name, total in self.sums.items()}
        step = self.first + self.num_done
        num_left = (self.num_epochs - self.epoch) * self.num_steps - step
        return (
            f"epoch {self.epoch + 1}/{self.num_epochs}, step {step}/{self.num_steps}: {in_words(means)}, "
            f"{self.num_done * self.batch_size / seconds:.2f} images/s, data wait {self.wait_ms / seconds / 10:.1f} %, "
            + time_left(num_left * seconds / self.num_done)
        )


def in_words(losses: Mapping[str, float]) -> str:
    """Losses by name, as a line of the log has them."""
    return ", ".join(f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in losses.items())
