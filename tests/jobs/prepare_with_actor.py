"""Prepare as a driver of its own, with a detector that is an actor on an imagined GPU; for the tests.

Arguments: devkit, out, CPUs; 0 CPUs mean the cluster at RAY_ADDRESS.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import ray

from instseg.config import PrepareConfig
from instseg.data.stages import Draft, detect
from instseg.jobs import networks
from instseg.jobs.prepare import prepare
from instseg.storage import StoragePath
from instseg.structures import Detections


class Imagined:
    """Finds in each image a box that its pixels alone decide."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return detect(Draft.decode(row), self.detections).encode()

    def detections(self, image: np.ndarray) -> Detections:
        time.sleep(0.05)  # long enough to be killed in
        x = int(image.sum()) % 40
        return Detections(np.array([1]), np.array([0.9], np.float32), np.array([[x, 5, x + 30, 40]], np.float32))


if __name__ == "__main__":
    devkit, out, num_cpus = sys.argv[1:]
    if int(num_cpus):
        ray.init(num_cpus=int(num_cpus), num_gpus=1, include_dashboard=False, log_to_driver=False)
    networks.Detect = Imagined  # pyright: ignore[reportAttributeAccessIssue]
    classes = str(StoragePath.of(devkit) / "classes.txt")
    prepare(PrepareConfig(out=out, devkit=devkit, split="train", classes=classes, detector="imagined", shard_size=2))
