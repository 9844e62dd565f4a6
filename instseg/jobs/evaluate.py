"""Evaluation and ablation as whole runs: a prepared data set and a network in, report and MLflow runs out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from instseg.config import AblateConfig, Ablation, EvaluateConfig, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord
from instseg.jobs.cluster import cluster
from instseg.jobs.evaluators import Evaluators, Predict
from instseg.jobs.tracking import Tracker, how_to_open
from instseg.models.checkpoint import find_checkpoint, from_json, load_network
from instseg.models.network import InstanceNetwork
from instseg.report.pictures import save_panel
from instseg.report.tables import (
    Evaluation,
    ablation_tables,
    circumstances,
    commit,
    summary,
    write_json,
    write_report,
)
from instseg.structures import InstanceMap, Sample

Config = TypeVar("Config")
State = dict[str, np.ndarray]
ROWS: tuple[Ablation, ...] = ("naive", "identification", "no_detection_potentials", "validity_ignored", "full")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate one network, write the report to `config.out`, record it in MLflow and print the table.

    Raises:
        FileNotFoundError: If the data directory or the checkpoint is missing.
        ValueError: If they do not fit each other or an image cannot be evaluated.
    """
    dataset = PreparedDataset(config.data)
    model, state = load(config, dataset)
    with (
        _start(config, "evaluate", Path(config.out)) as tracker,
        cluster(config.num_actors),
        Evaluators(dataset, build_predict, config.num_actors) as evaluators,
    ):
        evaluators.use(model, state)
        evaluation = _evaluate(config, dataset, evaluators, Path(config.out), tracker)
    print(f"{summary(evaluation)}\n\nreport: {config.out}\nMLflow: {how_to_open(config.tracking)}")
    return evaluation


def ablate(config: AblateConfig) -> dict[Ablation, Evaluation]:
    """Evaluate all `ROWS`, each in a nested MLflow run, and write them side by side. Raises as `evaluate`."""
    dataset = PreparedDataset(config.data)
    model, state = load(config, dataset)
    out = Path(config.out)
    rows: dict[Ablation, Evaluation] = {}
    with (
        _start(config, "ablate", out) as parent,
        cluster(config.num_actors),
        Evaluators(dataset, build_predict, config.num_actors) as evaluators,
    ):
        for ablation in ROWS:
            row = replace(config, model=replace(model, ablation=ablation))
            print(ablation, flush=True)
            with _start(row, "ablate", out / ablation, parent) as tracker:
                evaluators.use(row.model, state)
                rows[ablation] = _evaluate(row, dataset, evaluators, out / ablation, tracker)
        text, markdown = ablation_tables(rows)
        (out / "ablation.md").write_text(markdown)
        write_json(out / "ablation.json", {name: row.metrics() for name, row in rows.items()})
        for name in ("ablation.md", "ablation.json"):
            parent.log_artifact(out / name)
        parent.log_metrics(rows["full"].metrics())
    print(f"{text}\n\nreport: {config.out}\nMLflow: {how_to_open(config.tracking)}")
    return rows


def build_predict(model: ModelConfig, num_labels: int, state: Mapping[str, np.ndarray]) -> Predict:
    """Rebuild a network from its parameters, on the GPU where there is one."""
    network = InstanceNetwork(replace(model, semantic_weights=None), num_labels)
    network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def predict(sample: Sample) -> tuple[InstanceMap, np.ndarray]:
        with torch.inference_mode():
            output = network(sample)
            return network.instance_map(output, sample), output.semantic_logits.argmax(0).cpu().numpy()

    return predict


def load(config: EvaluateConfig, dataset: PreparedDataset) -> tuple[ModelConfig, State]:
    """Return configuration and parameters of the checkpoint's network, or of the hand-set one.

    With a checkpoint, options given in `config.model` that differ from their defaults change its configuration.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it does not fit the data or the options.
    """
    if config.checkpoint is None:
        network = InstanceNetwork(config.model, dataset.num_labels)
    else:
        trained = from_json(ModelConfig, find_checkpoint(Path(config.checkpoint)).config["model"])
        model = _override(trained, config.model, ModelConfig())
        network = load_network(config.checkpoint, model, dataset.num_labels)
    return network.config, {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def _override(base: Config, given: Config, default: Config) -> Config:
    """`base` with the fields of `given` that differ from `default`."""
    changes: dict[str, Any] = {}
    for field in fields(base):  # pyright: ignore[reportArgumentType]
        old, new, usual = (getattr(config, field.name) for config in (base, given, default))
        if is_dataclass(old):
            changes[field.name] = _override(old, new, usual)
        elif new != usual:
            changes[field.name] = new
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def _start(config: EvaluateConfig, workflow: str, out: Path, parent: Tracker | None = None) -> Tracker:
    tags = {"workflow": workflow, "mlflow.source.git.commit": commit() or "unknown"}
    spool = Path(config.out) / "mlflow_spool.jsonl"
    return Tracker.start(config.tracking, out.name, asdict(config), tags, spool, parent, resume=False)


def _evaluate(
    config: EvaluateConfig, dataset: PreparedDataset, evaluators: Evaluators, out: Path, tracker: Tracker
) -> Evaluation:
    """Score the network that the actors hold; write and log the report."""
    began = time.perf_counter()
    records = evaluators.records()
    evaluation = Evaluation.of(records, dataset.classes)
    measured = {"wall_s": time.perf_counter() - began}
    paths = write_report(evaluation, out, circumstances(asdict(config)) | measured)
    if config.num_figures:
        chosen = _informative(records, dataset.image_ids, config.num_figures)
        maps = evaluators.instance_maps(chosen)
        save_panel(out / "panel.png", [dataset[index] for index in chosen], maps, dataset.classes)
        paths.append(out / "panel.png")
    tracker.log_metrics(evaluation.metrics() | measured)
    for path in paths:
        tracker.log_artifact(path)
    return evaluation


def _informative(records: list[ImageRecord], image_ids: tuple[str, ...], num: int) -> list[int]:
    """Indices of the images with the most classes, then the most instances."""
    ranked = sorted(
        records, key=lambda record: (-len(set(record.truth_labels)), -len(record.truth_labels), record.image_id)
    )
    return [image_ids.index(record.image_id) for record in ranked[:num]]
