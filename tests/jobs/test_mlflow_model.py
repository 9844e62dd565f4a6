from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from instseg.config import GrabCutConfig, ModelConfig, TrackingConfig
from instseg.data.foreground import compute_foregrounds
from instseg.jobs.mlflow_server import quiet
from instseg.jobs.tracking import Tracker
from instseg.models.checkpoint import epoch_folder, save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.structures import Detections, InstanceMap, Sample
from tests.jobs.conftest import encode_png, make_sample

CLASSES = ["background", "square", "circle", "cross"]
BOXES = [[2, 4, 12, 11], [15, 7, 13, 14]]  # x, y, w, h


def photograph() -> Sample:
    """A tiny image with two detections, as a detector and a semantic network without our code would leave it."""
    sample = make_sample(1)
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in BOXES], np.float32)
    given = Detections(np.array([1, 2]), np.array([0.9, 0.6], np.float32), boxes)
    detections, _ = compute_foregrounds(sample.image, given, "photo", GrabCutConfig())
    return Sample("photo", sample.image, detections, logits=sample.logits)


def row_of(sample: Sample) -> dict[str, str]:
    archive = io.BytesIO()
    np.savez(archive, logits=sample.logits)  # pyright: ignore[reportArgumentType]
    detections = [
        {"category_id": label, "bbox": box, "score": score}
        for label, box, score in zip([1, 2], BOXES, [0.9, 0.6], strict=True)
    ]
    return {
        "image": base64.b64encode(encode_png(sample.image)).decode(),
        "detections": json.dumps(detections),
        "logits": base64.b64encode(archive.getvalue()).decode(),
        "image_id": "photo",
    }


def save(run: Path) -> InstanceNetwork:
    torch.manual_seed(0)
    network = InstanceNetwork(ModelConfig(), 4)
    config = {"model": asdict(ModelConfig()), "num_labels": 4, "classes": CLASSES}
    save_checkpoint(epoch_folder(run, 1), network.state_dict(), config, state={"epoch": 1})
    return InstanceNetwork.load(run)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose checkpoint was logged and registered, twice, in a store beside it."""
    root = tmp_path_factory.mktemp("store")
    save(root / "run")
    config = TrackingConfig(uri=f"sqlite:///{root}/mlflow.db", registered_model="tiny")
    with Tracker.start(config, "name", {}, {}, root / "run" / "spool.jsonl") as tracker:
        for _ in range(2):
            tracker.log_model(epoch_folder(root / "run", 1), config.registered_model)
    assert not (root / "run" / "spool.jsonl").exists()
    return root


def test_the_model_is_registered_once(logged: Path) -> None:
    with quiet():
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{logged}/mlflow.db")
        (version,) = client.search_model_versions("name = 'tiny'")
        experiment = client.get_experiment_by_name("instseg")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        (model,) = client.search_logged_models([experiment.experiment_id])
    assert version.run_id == run.info.run_id == model.source_run_id
    assert version.source == model.artifact_location
    assert str(model.status) == "READY"


def test_nothing_of_it_is_pickled(logged: Path) -> None:
    files = [path for path in (logged / "mlartifacts").rglob("*") if path.is_file()]
    assert {"MLmodel", "served_model.py", "model.safetensors", "network.py"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_mlflow_predicts_what_the_network_does(logged: Path, tmp_path: Path) -> None:
    """In another process, with the code that was logged: not a module of this repository is on its path."""
    sample = photograph()
    empty = {**row_of(sample), "detections": "[]"}
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_records": [row_of(sample), empty]}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", "models:/tiny/1", "-t", "json"]
    command += ["-i", "in.json", "-o", "out.json", "--env-manager", "local"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{logged}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    instances, nothing = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert nothing == []
    network = InstanceNetwork.load(logged / "run")
    with torch.inference_mode():
        check(instances, network.instance_map(network(sample)))


def check(instances: list[dict[str, Any]], expected: InstanceMap) -> None:
    assert len(instances) == len(expected) > 0
    for k, instance in enumerate(instances):
        mask = expected.instances == k + 1
        ys, xs = np.nonzero(mask)
        assert (coco_mask.decode(instance["segmentation"]) == mask).all()
        assert instance["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert instance["score"] == pytest.approx(float(expected.scores[k]), abs=1e-6)
        assert (instance["category_id"], instance["class"]) == (expected.labels[k], CLASSES[expected.labels[k]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detections": None}, "row 0: detections: expected a JSON list .* got none; the model has no detector"),
        ({"detections": "{}"}, r"row 0: detections: expected a JSON list of \{category_id, .* got \{\}"),
        ({"detections": '[{"category_id": 9, "bbox": [0, 0, 9, 9], "score": 1}]'}, r"detections\[0\].*category_id"),
        ({"logits": None}, "row 0: logits: expected a file in base64, got none"),
        ({"image": "no base64!"}, "row 0: image: expected a file in base64"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, "row 0: neither a JPEG nor a PNG"),
    ],
)
def test_a_row_that_does_not_do_is_named(tmp_path: Path, change: dict[str, str | None], message: str) -> None:
    network = save(tmp_path)
    with quiet():
        import pandas as pd

        from instseg.jobs.served_model import ServedModel

        served: Any = ServedModel()
    served.network, served.classes = network, CLASSES
    with pytest.raises(ValueError, match=message):
        served.predict(None, pd.DataFrame([{**row_of(photograph()), **change}]))
