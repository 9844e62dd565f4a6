"""Evaluation as a whole run: a prepared data set and a network in, report and MLflow run out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from operator import attrgetter
from typing import TypeVar

from instseg.config import AblateConfig, Ablation, EvaluateConfig, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord
from instseg.jobs.cluster import cluster, cluster_nodes
from instseg.jobs.devices import describe, plan_evaluators
from instseg.jobs.diagnose import diagnose
from instseg.jobs.ending import command, end
from instseg.jobs.evaluators import Evaluators
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.tracking import SPOOL, Tracker, how_to_open
from instseg.jobs.validate import informative
from instseg.models.checkpoint import INITIAL_WEIGHTS, check_classes, find_checkpoint, from_json
from instseg.models.network import InstanceNetwork
from instseg.report.pictures import save_panel
from instseg.report.provenance import commit, provenance
from instseg.report.reliability import save_reliability
from instseg.report.tables import REPORT, Evaluation, per_class, summary, write_report
from instseg.storage import StoragePath

Config = TypeVar("Config", bound=AblateConfig)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate one network, write the report to `config.out`, record it in MLflow and print the table.

    Raises:
        FileNotFoundError: If the data directory or the checkpoint is missing.
        ValueError: If they do not fit each other, the cluster has less than was asked for, or an image cannot be
            evaluated.
        JobError: If Ray does not start or its actors die again and again.
    """
    check_inputs(data=config.data, checkpoint=config.checkpoint)
    dataset, out = PreparedDataset(config.data), StoragePath.of(config.out)
    with (
        running_evaluators(config, dataset) as (config, evaluators),
        start_tracker(config, "evaluate", out.name, dataset) as tracker,
    ):
        evaluation, records = evaluate_ablation(config, config.ablation, dataset, evaluators, out, tracker)
        text = summary(evaluation)
        if config.diagnose:
            text += f"\n\n{diagnose(config, dataset, evaluators, records, tracker)}"
    print(text)
    end(out, (REPORT,), [command("compare", str(out), "FOLDER")], how_to_open(config.tracking))
    return evaluation


@contextmanager
def running_evaluators(config: Config, dataset: PreparedDataset) -> Iterator[tuple[Config, Evaluators]]:
    """Actors that hold the network, and `config` with what was chosen where it left a choice: model, device, actors."""
    check_out(config.out)
    if not len(dataset):
        raise ValueError(f"data directory {config.data}: has no images")
    network = build_network(config, dataset)
    with cluster():
        check_nodes(data=dataset.root)  # the driver alone reads the checkpoint and writes the report
        nodes = cluster_nodes()
        plan = plan_evaluators(config.device, config.num_actors, len(dataset), nodes)
        text = f"evaluating {len(dataset)} images with {plan.num_actors} actors on {plan.device.upper()}s"
        print(f"{text}; the cluster has {describe(nodes)}", flush=True)
        chosen = replace(config, model=network.config, device=plan.device, num_actors=plan.num_actors)
        with Evaluators(dataset, network, plan) as evaluators:
            yield chosen, evaluators


def build_network(config: AblateConfig, dataset: PreparedDataset) -> InstanceNetwork:
    """The network that `config.model` describes, with the checkpoint's weights or the hand-set ones, on the CPU.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it does not fit the data or the model, `config.model` has initial weights other than its, or a
            detection head without a checkpoint.
    """
    if config.checkpoint is None:
        if config.model is not None and config.model.detection_head:
            raise ValueError("model.detection_head: expected False without a checkpoint, as it has no hand-set weights")
        return InstanceNetwork(config.model or ModelConfig(), dataset.num_labels)
    checkpoint = find_checkpoint(config.checkpoint)
    check_classes(checkpoint, dataset.classes)
    trained = from_json(ModelConfig, checkpoint.config["model"])
    for name in INITIAL_WEIGHTS:
        before = attrgetter(name)(trained)
        given = before if config.model is None else attrgetter(name)(config.model)
        if given not in (None, before):
            raise ValueError(
                f"model.{name}: {given!r} has no effect beside checkpoint {checkpoint.folder}, whose weights were "
                f"trained from {before!r}; leave it at that, or leave out the checkpoint"
            )
    return InstanceNetwork.load(checkpoint.folder, config.model or trained, dataset.num_labels)


def start_tracker(
    config: AblateConfig, workflow: str, name: str, dataset: PreparedDataset, parent: Tracker | None = None
) -> Tracker:
    """The MLflow run of an evaluation, or of one of several of them in a `parent`."""
    tags = {"workflow": workflow, "mlflow.source.git.commit": commit() or "unknown"}
    params, spool = {**asdict(config), "data_digest": dataset.digest}, StoragePath.of(config.out) / SPOOL
    return Tracker.start(config.tracking, name, params, tags, spool, parent, resume=False)


def evaluate_ablation(
    config: AblateConfig,
    ablation: Ablation,
    dataset: PreparedDataset,
    evaluators: Evaluators,
    out: StoragePath,
    tracker: Tracker,
) -> tuple[Evaluation, list[ImageRecord]]:
    """Score what `ablation` leaves of the network that the actors hold; write and log the report."""
    began = time.perf_counter()
    records = evaluators.records(ablation)
    evaluation = Evaluation.of(records, dataset.classes)
    measured = {"wall_s": time.perf_counter() - began}
    paths = write_report(evaluation, out, provenance(asdict(config), dataset.digest) | measured)
    save_reliability(out / "calibration.png", evaluation.calibration)
    paths.append(out / "calibration.png")
    if config.num_figures:
        chosen = informative(records, dataset.image_ids, config.num_figures)
        maps = evaluators.instance_maps(chosen, ablation)
        save_panel(out / "panel.png", [dataset[index] for index in chosen], maps, dataset.classes)
        paths.append(out / "panel.png")
        tracker.log_image(out / "panel.png", "panel", 0, int(time.time() * 1000))
    tracker.log_input("evaluation", config.data, dataset.digest, len(dataset), "evaluation")
    log_evaluation(tracker, evaluation, paths, measured)
    return evaluation, records


def log_evaluation(
    tracker: Tracker, evaluation: Evaluation, paths: Iterable[StoragePath], measured: Mapping[str, float] | None = None
) -> None:
    """Record the metrics, and others that were measured, the table of classes, and the files of a report in MLflow."""
    tracker.log_metrics({**evaluation.metrics(), **(measured or {})})
    rows = [{"class": row["class"], "ap_r_vol": row.get("sds/ap_r_vol"), **row} for row in per_class(evaluation)]
    tracker.log_table(rows, "classes")  # MLflow compares the second column, unless asked for another
    for path in paths:
        tracker.log_artifact(path)
