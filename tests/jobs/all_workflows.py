"""Prepare, train, evaluate and ablate below each of the given roots, as a driver on a cluster would; for the tests.

The devkit, with detections and logits, lies in the folder `devkit` of the root, MLflow's database in the current one.
"""

from __future__ import annotations

import sys

from instseg.config import AblateConfig, EvaluateConfig, PrepareConfig, TrackingConfig, TrainConfig
from instseg.jobs.ablate import ablate
from instseg.jobs.cluster import cluster
from instseg.jobs.evaluate import evaluate
from instseg.jobs.prepare import prepare
from instseg.jobs.train import train
from instseg.storage import StoragePath

SHARD_SIZE, NUM_EPOCHS = 2, 2
TRACKING = TrackingConfig("sqlite:///mlflow.db")


def run_all(root: StoragePath) -> None:
    """All four, one after the other."""
    devkit, data, run = (str(root / name) for name in ("devkit", "data", "run"))
    inputs = PrepareConfig(
        out=data,
        devkit=devkit,
        split="train",
        classes=str(root / "devkit" / "classes.txt"),
        detections=str(root / "devkit" / "detections.json"),
        logits=str(root / "devkit" / "logits"),
        shard_size=SHARD_SIZE,
    )
    prepare(inputs)
    train(TrainConfig(data, run, num_epochs=NUM_EPOCHS, device="cpu", tracking=TRACKING))
    num_actors = 1 if root.scheme == "file" else 2  # one on each node; the numbers are the same
    report, ablation = str(root / "report"), str(root / "ablation")
    evaluate(EvaluateConfig(data, report, run, tracking=TRACKING, num_actors=num_actors, num_gallery=1))
    ablate(AblateConfig(data, ablation, run, tracking=TRACKING, num_actors=num_actors, num_gallery=0))


if __name__ == "__main__":
    with cluster():
        for place in sys.argv[1:]:
            run_all(StoragePath.of(place))
