"""Records of a run that have a form of their own in MLflow: data sets, pictures by step, and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from instseg.storage import StoragePath

DIGEST_LENGTH = 36  # MLflow's limit
_IMAGES = "images"  # where MLflow looks for them


def log_input(client: Any, run_id: str, event: Mapping[str, Any]) -> None:
    """Log a data set as an input of the run; one that it has already is not logged again.

    Args:
        client: An `MlflowClient`.
        run_id: Whose input it is.
        event: `name`, `place`, `digest`, `num_images`, `context`, of `Tracker.log_input`.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": event["place"]})
    profile = json.dumps({"num_images": event["num_images"], "sha256": event["digest"]})
    dataset = Dataset(event["name"], event["digest"][:DIGEST_LENGTH], "parquet", source, profile=profile)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])])


def log_image(client: Any, run_id: str, event: Mapping[str, Any]) -> None:
    """Log a picture of a step; one of the same step and time that is there already is not logged again.

    Args:
        client: An `MlflowClient`.
        run_id: Whose picture it is.
        event: `path`, `image`, `step`, `time_ms`, of `Tracker.log_image`.

    Raises:
        FileNotFoundError: If the picture is gone.
    """
    from PIL import Image

    moment = f"{_IMAGES}/{event['image']}+step+{event['step']}+timestamp+{event['time_ms']}+"
    if any(file.path.startswith(moment) for file in client.list_artifacts(run_id, _IMAGES)):
        return
    with StoragePath.of(event["path"]).on_disk() as path, Image.open(path, formats=("PNG",)) as picture:
        options = {"key": event["image"], "step": event["step"], "timestamp": event["time_ms"], "synchronous": True}
        client.log_image(run_id, picture.convert("RGB"), **options)


def log_table(client: Any, run_id: str, event: Mapping[str, Any]) -> None:
    """Log a table, which MLflow shows beside those of that name of other runs; one that is there is not logged again.

    Args:
        client: An `MlflowClient`.
        run_id: Whose table it is.
        event: `table`, `rows`, of `Tracker.log_table`.
    """
    file = f"{event['table']}.json"
    if any(artifact.path == file for artifact in client.list_artifacts(run_id)):  # MLflow would add the rows to it
        return
    columns = dict.fromkeys(name for row in event["rows"] for name in row)
    client.log_table(run_id, {name: [row.get(name) for row in event["rows"]] for name in columns}, file)


LOG = {"input": log_input, "image": log_image, "table": log_table}
