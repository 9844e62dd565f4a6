"""A driver of a training in which first a worker and then the driver is killed, both in the middle of an epoch.

Its only argument is the run directory, beside which it finds its configuration and leaves what was trained on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from instseg.config import TrainConfig
from instseg.jobs import train_fit
from instseg.jobs.train import train
from instseg.models.checkpoint import from_json

KILL_WORKER, KILL_DRIVER = 7, 15  # steps before these are done, and the last checkpoint is of the one before


def watched_loop(folder: Path, driver: int | None = None) -> Callable[[Any], None]:
    """The loop of a worker that writes down each step and its images; with a driver to kill, the deadly one."""

    def loop(loop_config: Any) -> None:  # in a function, so that Ray sends it to its workers with its code
        from instseg.jobs import train_loop

        take_step = train_loop._take_step

        def watched(worker: Any, samples: Sequence[Any], *others: Any) -> Any:
            step = worker.progress.step
            if driver and step == KILL_WORKER and worker.rank == 1 and not (folder / "worker").exists():
                die(worker, os.getpid(), folder / "worker")
            if driver and step == KILL_DRIVER and worker.rank == 0:
                die(worker, driver, folder / "driver")
            with (folder / f"steps_{worker.rank}.jsonl").open("a") as file:
                file.write(json.dumps([os.getpid(), step, [sample.image_id for sample in samples]]) + "\n")
            return take_step(worker, samples, *others)

        def die(worker: Any, pid: int, marker: Path) -> None:
            name = f"epoch_{worker.progress.epoch:04d}_image_{worker.progress.images - 2:07d}"
            while not (Path(worker.config.out) / "checkpoints" / name / "manifest.json").exists():
                time.sleep(0.01)  # it is uploaded while training goes on
            marker.touch()
            os.kill(pid, signal.SIGKILL)
            signal.pause()

        train_loop._take_step = watched
        train_loop.train_loop(loop_config)

    return loop


if __name__ == "__main__":
    run = Path(sys.argv[1])
    train_fit.train_loop = watched_loop(run.parent, os.getpid())
    train(from_json(TrainConfig, json.loads((run.parent / "config.json").read_text())))
