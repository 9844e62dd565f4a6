#!/usr/bin/env python
"""What an object store costs against a local folder: prepare, one training epoch, evaluate, in turn on both.

The store is an S3 server on this machine that answers each request 25 ms late, as a store in the same region does; it
shares the two cores with the work, which a real one does not. The data are generated scenes of VOC's size.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from instseg.config import EvaluateConfig, PrepareConfig, TrackingConfig, TrainConfig
from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.cluster import cluster
from instseg.jobs.evaluate import evaluate
from instseg.jobs.prepare import prepare
from instseg.jobs.train import train
from instseg.models.checkpoint import find_checkpoint
from instseg.storage import StoragePath
from tests.s3 import S3, running_s3

NUM_IMAGES, SIZE, ROUNDS = 16, (376, 496), 2
LATENCY_S = 0.025  # of each request
GPU_STEP_S = 0.05  # during which a training on a GPU leaves the CPU to the readers


def main() -> None:
    """Print a table and write results/storage.json."""
    with running_s3() as s3, tempfile.TemporaryDirectory() as folder:
        s3.hook = _late
        local = Path(folder)
        write_synthetic_devkit(str(local / "devkit"), num_train=NUM_IMAGES, num_val=1, seed=0, size=SIZE)
        roots = {"folder": StoragePath.of(local), "store": StoragePath.of(s3("bench"))}
        for path in (path for path in (local / "devkit").rglob("*") if path.is_file()):
            (roots["store"] / path.relative_to(local).as_posix()).publish_file(path)
        tracking = TrackingConfig(f"sqlite:///{folder}/mlflow.db")
        with cluster():
            _measure(roots["folder"], "warm_up", tracking, s3)  # Ray's workers, compiled code
            rounds = [
                {kind: _measure(root, f"round_{number}", tracking, s3) for kind, root in roots.items()}
                for number in range(ROUNDS)
            ]
    result = {name: _compare([(r["folder"][name], r["store"][name]) for r in rounds]) for name in rounds[0]["store"]}
    for name, row in result.items():
        print(f"{name:28}  folder {row['folder']:9.2f}  store {row['store']:9.2f}  ratio {row['ratio']}")
    circumstances = {"num_images": NUM_IMAGES, "size": SIZE, "rounds": ROUNDS, "latency_ms": 1000 * LATENCY_S}
    print(write_result("storage", circumstances | {"median": result}))


def _late(*_: object) -> None:
    time.sleep(LATENCY_S)


def _measure(root: StoragePath, name: str, tracking: TrackingConfig, s3: S3) -> dict[str, float]:
    """Seconds of each workflow with its start, and what of a training step is waiting for data."""
    devkit, data = root / "devkit", str(root / name / "data")
    run, report = str(root / name / "run"), str(root / name / "report")
    detections, logits, classes = (str(devkit / name) for name in ("detections.json", "logits", "classes.txt"))
    inputs = PrepareConfig(
        out=data,
        devkit=str(devkit),
        split="train",
        classes=classes,
        detections=detections,
        logits=logits,
        shard_size=4,
    )
    s3.requests.clear()
    found = {
        "prepare_s": _seconds(lambda: prepare(inputs)),
        "train_epoch_s": _seconds(lambda: train(TrainConfig(data, run, tracking=tracking))),
        "evaluate_s": _seconds(lambda: evaluate(EvaluateConfig(data, report, run, tracking=tracking))),
        "requests": float(len(s3.requests)),
    }
    record = find_checkpoint(run).state["records"][-1]
    step_ms = 2000 / record["images_per_second"]  # two workers, an image each
    found |= {"cpu_step_ms": step_ms, "cpu_data_wait_percent": 100 * record["data_wait_ms"] / step_ms}
    return found | {"gpu_data_wait_percent": _gpu_wait(PreparedDataset(data))}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _gpu_wait(dataset: PreparedDataset) -> float:
    """Percentage of the steps' time that a worker waits for data, if each step takes GPU_STEP_S elsewhere."""
    order = list(range(len(dataset))) * 6
    waited, start = 0.0, time.perf_counter()
    samples, asked = read_ahead(dataset.__getitem__, order), time.perf_counter()
    for _ in samples:
        waited += time.perf_counter() - asked
        time.sleep(GPU_STEP_S)
        asked = time.perf_counter()
    return 100 * waited / (time.perf_counter() - start)


def _compare(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    folder, store = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = sorted(round(second / first, 3) for first, second in pairs if first > 0)
    return {"folder": folder, "store": store, "ratio": ratios}


if __name__ == "__main__":
    main()
