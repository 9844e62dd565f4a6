"""The trained network as an MLflow model from code: logged with its run and registered, each checkpoint once."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instseg.data.files import sha256_of
from instseg.models.checkpoint import MODEL, find_checkpoint, save_checkpoint
from instseg.storage import StoragePath

CHECKPOINT_TAG = "instseg.checkpoint"  # SHA-256 of its weights
_PACKAGE = Path(__file__).resolve().parents[1]
_CODE = Path(__file__).with_name("served_model.py")
_REQUIREMENTS = (
    *("mlflow", "torch", "torchvision", "numpy", "numba", "safetensors", "opencv-python-headless"),
    *("pillow", "pycocotools", "pyarrow", "fsspec", "tenacity", "pandas"),
)


def log_model(client: Any, experiment_id: str, run_id: str, folder: StoragePath, registered: str) -> None:
    """Log a checkpoint as a model of the run, and register it; what has been done of that is not done again.

    Args:
        client: An `MlflowClient`.
        experiment_id: Of the run.
        run_id: Whose model it is.
        folder: The checkpoint.
        registered: Name of the registered model, of which this becomes the next version.

    Raises:
        FileNotFoundError: If the checkpoint is gone.
        ValueError: If it is damaged.
        mlflow.exceptions.MlflowException, OSError: If the server does not take it.
    """
    digest = sha256_of(find_checkpoint(folder).folder / MODEL)
    tags = {CHECKPOINT_TAG: digest}
    tagged = f"tags.`{CHECKPOINT_TAG}` = '{digest}'"
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}' AND {tagged}")
    model = found[0] if found else client.create_logged_model(experiment_id, registered, run_id, tags)
    if str(model.status) != "READY":
        with tempfile.TemporaryDirectory() as local:
            save_model(Path(local) / "model", folder, model)
            client.log_model_artifacts(model.model_id, str(Path(local) / "model"))
        client.finalize_logged_model(model.model_id, "READY")
    if not client.search_registered_models(f"name = '{registered}'"):
        client.create_registered_model(registered, description="instance segmentation: images and detections to masks")
    versions = client.search_model_versions(f"name = '{registered}' and run_id = '{run_id}'")
    if digest not in [each.tags.get(CHECKPOINT_TAG) for each in versions]:
        # Not "models:/<id>": for a database, MLflow would look that up at its global tracking URI.
        client.create_model_version(registered, model.artifact_location, run_id, tags, model_id=model.model_id)


def save_model(target: Path, place: StoragePath, logged: Any = None) -> None:
    """Write a checkpoint, the code that serves it, what that needs, and an example, as MLflow's format wants them.

    Args:
        target: A new folder of this machine.
        place: The checkpoint.
        logged: The `LoggedModel` that it is, if any.
    """
    from mlflow.models import Model
    from mlflow.pyfunc import save_model as save

    checkpoint = find_checkpoint(place)
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder) / "checkpoint")
        save_checkpoint(local, checkpoint.model(), checkpoint.config)  # without the optimizer
        save(
            target,
            python_model=str(_CODE),
            code_paths=[str(_PACKAGE)],
            artifacts={"checkpoint": local},
            signature=_signature(),
            input_example=example(checkpoint.config["num_labels"]),
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
            mlflow_model=Model(model_id=logged.model_id, run_id=logged.source_run_id) if logged else Model(),
        )


def _signature() -> Any:
    """What a row has: files in base64, so that JSON can hold them."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    return ModelSignature(
        inputs=Schema(
            [
                ColSpec("string", "image"),  # JPEG or PNG
                ColSpec("string", "detections"),  # a JSON list of {category_id 1..K, bbox [x, y, w, h], score}
                ColSpec("string", "logits", required=False),  # .npz with `logits` (L, h, w), for models without FCN
                ColSpec("string", "image_id", required=False),  # part of the seed of GrabCut
            ]
        )
    )


def example(num_labels: int) -> dict[str, list[str]]:
    """A row: a square on a grey ground, found by a detector."""
    image = np.full((32, 48, 3), 128, np.uint8)
    image[8:24, 12:36] = (200, 60, 40)
    logits = np.zeros((num_labels, 8, 12), np.float16)
    logits[1, 2:6, 3:9] = 4
    picture, archive = io.BytesIO(), io.BytesIO()
    Image.fromarray(image).save(picture, "PNG")
    np.savez(archive, logits=logits)
    detections = [{"category_id": 1, "bbox": [11, 7, 26, 18], "score": 0.9}]
    return {
        "image": [base64.b64encode(picture.getvalue()).decode()],
        "detections": [json.dumps(detections)],
        "logits": [base64.b64encode(archive.getvalue()).decode()],
    }
