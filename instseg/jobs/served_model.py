"""The code of the MLflow model that a training logs: images in base64 come in, instances as JSON values go out.

MLflow keeps this file, the package and a checkpoint together, and runs it where the model is loaded; nothing is
pickled. `instseg.jobs.mlflow_model` says what the columns are.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from instseg.config import GrabCutConfig
from instseg.data.foreground import compute_foregrounds
from instseg.data.images import decode_photograph
from instseg.data.network_outputs import DetectionRecord, import_detections, parse_json, parse_logits
from instseg.models.checkpoint import find_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.structures import Detections, Sample


class ServedModel(PythonModel):
    """A trained network and the names of its classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint that was logged with this code."""
        self.network = InstanceNetwork.load(context.artifacts["checkpoint"])
        trained = find_checkpoint(context.artifacts["checkpoint"]).config
        self.classes = trained.get("classes") or [str(label) for label in range(trained["num_labels"])]

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None
    ) -> list[Any]:
        """The instances of each row's image.

        Returns:
            For each row a list of {class, image_id, category_id 1..K, score, bbox [x, y, w, h] in pixels,
            segmentation}, as in COCO results; the segmentation is COCO RLE with text counts.

        Raises:
            ValueError: If a row is unfit; names it.
        """
        return [self._instances(index, row) for index, row in enumerate(model_input.to_dict("records"))]

    def _instances(self, index: int, row: dict[Any, Any]) -> list[dict[str, Any]]:
        try:
            with torch.inference_mode():
                sample = self._sample(row)
                found = self.network.instance_map(self.network(sample))
        except Exception as error:  # of a file that is no archive, of JSON that is too deep, ...
            raise ValueError(f"row {index}: {error}") from error
        image_id = row.get("image_id")
        results = found.to_coco(image_id if isinstance(image_id, str) else "")
        return [{"class": self.classes[result["category_id"]], **result} for result in results]

    def _sample(self, row: dict[Any, Any]) -> Sample:
        given = {name: value for name, value in row.items() if isinstance(value, str)}  # left out is None or NaN
        image = decode_photograph(_decode("image", given)).pixels
        image_id = given.get("image_id", "")
        detections = self._detections(given, image, image_id)
        logits = None
        if self.network.semantic is None:
            logits = parse_logits(_decode("logits", given), self.network.num_labels)
        return Sample(image_id, image, detections, logits=logits)

    def _detections(self, given: dict[str, str], image: np.ndarray, image_id: str) -> Detections:
        expected = "expected a JSON list of {category_id, bbox [x, y, w, h], score}"
        if "detections" not in given:
            advice = "the model has no detector of its own; give what one found, or [] for nothing"
            raise ValueError(f"detections: {expected}, got none; {advice}")
        entries = parse_json(given["detections"])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"detections: {expected}, got {given['detections'][:80]}")
        records = [DetectionRecord(f"detections[{index}]", entry) for index, entry in enumerate(entries)]
        labels = {label: label for label in range(1, self.network.num_labels)}
        detections, bad = import_detections(image_id, records, (image.shape[0], image.shape[1]), labels, 0.0)
        if bad:
            raise ValueError(f"{bad[0].file}: {bad[0].reason}")
        return compute_foregrounds(image, detections, image_id, GrabCutConfig())[0]


def _decode(column: str, given: dict[str, str]) -> bytes:
    if column not in given:
        raise ValueError(f"{column}: expected a file in base64, got none")
    try:
        return base64.b64decode(given[column], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{column}: expected a file in base64 ({error}), got {given[column][:40]!r}") from None


set_model(ServedModel())
