"""Evaluation as a whole run: a prepared data set and a network in, report and MLflow run out."""

from __future__ import annotations

import time
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from instseg.config import AblateConfig, Ablation, EvaluateConfig, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord
from instseg.jobs.cluster import cluster
from instseg.jobs.evaluators import Evaluators
from instseg.jobs.tracking import Tracker, how_to_open
from instseg.models.checkpoint import find_checkpoint, from_json
from instseg.models.network import InstanceNetwork
from instseg.report.pictures import save_panel
from instseg.report.provenance import commit, provenance
from instseg.report.tables import Evaluation, summary, write_report

Config = TypeVar("Config")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate one network, write the report to `config.out`, record it in MLflow and print the table.

    Raises:
        FileNotFoundError: If the data directory or the checkpoint is missing.
        ValueError: If they do not fit each other or an image cannot be evaluated.
    """
    dataset = PreparedDataset(config.data)
    network = build_network(config, dataset)
    out = Path(config.out)
    with (
        start_tracker(config, "evaluate", out) as tracker,
        cluster(config.num_actors),
        Evaluators(dataset, network, config.num_actors) as evaluators,
    ):
        evaluation = evaluate_ablation(config, config.ablation, dataset, evaluators, out, tracker)
    print(f"{summary(evaluation)}\n\nreport: {config.out}\nMLflow: {how_to_open(config.tracking)}")
    return evaluation


def build_network(config: AblateConfig, dataset: PreparedDataset) -> InstanceNetwork:
    """The checkpoint's network, or that of the hand-set parameters, on the CPU.

    With a checkpoint, options given in `config.model` that differ from their defaults change its configuration.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it does not fit the data or the options.
    """
    if config.checkpoint is None:
        return InstanceNetwork(config.model, dataset.num_labels)
    trained = from_json(ModelConfig, find_checkpoint(Path(config.checkpoint)).config["model"])
    model = _override(trained, config.model, ModelConfig())
    return InstanceNetwork.load(config.checkpoint, model, dataset.num_labels)


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


def start_tracker(config: AblateConfig, workflow: str, out: Path, parent: Tracker | None = None) -> Tracker:
    """The MLflow run of an evaluation, or of one of several of them in a `parent`."""
    tags = {"workflow": workflow, "mlflow.source.git.commit": commit() or "unknown"}
    spool = Path(config.out) / "mlflow_spool.jsonl"
    return Tracker.start(config.tracking, out.name, asdict(config), tags, spool, parent, resume=False)


def evaluate_ablation(
    config: AblateConfig,
    ablation: Ablation,
    dataset: PreparedDataset,
    evaluators: Evaluators,
    out: Path,
    tracker: Tracker,
) -> Evaluation:
    """Score what `ablation` leaves of the network that the actors hold; write and log the report."""
    began = time.perf_counter()
    records = evaluators.records(ablation)
    evaluation = Evaluation.of(records, dataset.classes)
    measured = {"wall_s": time.perf_counter() - began}
    paths = write_report(evaluation, out, provenance(asdict(config)) | measured)
    if config.num_figures:
        chosen = _informative(records, dataset.image_ids, config.num_figures)
        maps = evaluators.instance_maps(chosen, ablation)
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
