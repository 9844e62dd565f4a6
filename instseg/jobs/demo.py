"""The whole system on a generated data set, and a photograph."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from instseg import recipes
from instseg.config import AblateConfig, DemoConfig, PrepareConfig, TrackingConfig
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.ablate import ablate
from instseg.jobs.photograph import save_photograph
from instseg.jobs.prepare import prepare
from instseg.jobs.train import train
from instseg.storage import StoragePath


def demo(config: DemoConfig) -> None:
    """Run the workflows one after the other into the folder `config.out`.

    Raises:
        ValueError: If it is no folder of this machine; else as the workflows do.
    """
    out = StoragePath.of(config.out).local
    if out is None:
        raise ValueError(f"out: expected a folder of this machine, got {config.out}; the demo runs on one")
    if find_spec("skimage") is None:
        print("no photograph: scikit-image, which ships it, is not installed", flush=True)
    else:
        save_photograph(out / "photograph.png")
        print(f"a photograph, segmented from boxes and a map drawn by hand: {out / 'photograph.png'}", flush=True)
    tracking = TrackingConfig(uri=f"sqlite:///{out}/mlflow.db")
    devkit = out / "devkit"
    write_synthetic_devkit(str(devkit), num_train=60, num_val=40, seed=0)
    for split in ("train", "val"):
        inputs = PrepareConfig(
            devkit=str(devkit), split=split, detections=f"{devkit}/detections.json", out=str(out / split)
        )
        prepare(replace(inputs, logits=f"{devkit}/logits", classes=f"{devkit}/classes.txt"))
    run = replace(recipes.demo(str(out / "train"), str(out / "run")), tracking=tracking)
    train(run)
    ablate(AblateConfig(str(out / "val"), str(out / "report"), checkpoint=run.out, tracking=tracking))
