#!/usr/bin/env python
"""The whole system on a generated data set, in minutes on two cores: prepare, train, evaluate, ablate."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instseg.config import AblateConfig, PrepareConfig, TrackingConfig
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.ablate import ablate
from instseg.jobs.prepare import prepare
from instseg.jobs.train import train
from instseg.recipes import synthetic

OUT = Path("runs/demo")


def main() -> None:
    """Run the four workflows one after the other, through the same functions as their scripts."""
    tracking = TrackingConfig(uri=f"sqlite:///{OUT.resolve()}/mlflow.db")
    devkit = OUT / "devkit"
    write_synthetic_devkit(str(devkit), num_train=60, num_val=40, seed=0)
    for split in ("train", "val"):
        config = PrepareConfig(str(devkit), split, detections=f"{devkit}/detections.json", out=str(OUT / split))
        prepare(replace(config, logits=f"{devkit}/logits", classes=f"{devkit}/classes.txt"))
    run = replace(synthetic(str(OUT / "train"), str(OUT / "run")), tracking=tracking)
    train(run)
    ablate(AblateConfig(str(OUT / "val"), str(OUT / "report"), checkpoint=run.out, tracking=tracking))


if __name__ == "__main__":
    main()
