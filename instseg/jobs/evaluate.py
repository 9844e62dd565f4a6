"""Evaluation as a whole run: a prepared data set and a network in, report and MLflow run out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from operator import attrgetter
from typing import TypeVar

from instseg.config import FULL, AblateConfig, Ablation, EvaluateConfig, ModelConfig
from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.jobs.cluster import cluster, cluster_nodes
from instseg.jobs.devices import describe, plan_evaluators
from instseg.jobs.diagnose import diagnose
from instseg.jobs.ending import command, end
from instseg.jobs.evaluators import Evaluators
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.tracking import SPOOL, Tracker, how_to_open
from instseg.models.checkpoint import INITIAL_WEIGHTS, check_classes, find_checkpoint, from_json
from instseg.models.network import InstanceNetwork
from instseg.report import sections
from instseg.report.cells import shrink
from instseg.report.gallery import Selection, Shown, gallery
from instseg.report.page import REPORT, Section, save_page
from instseg.report.pictures import save_panel
from instseg.report.provenance import commit, provenance
from instseg.report.results import write_results
from instseg.report.tables import Evaluation, per_class, summary
from instseg.storage import StoragePath
from instseg.structures import Sample

Config = TypeVar("Config", bound=AblateConfig)
NUM_PANELS = 4  # images in a run's panel
_PANEL = "panel.png"


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
        selection = Selection(config.num_gallery)
        evaluation = evaluate_ablation(config, config.ablation, dataset, evaluators, out, tracker, selection)
        texts, parts = [summary(evaluation)], [sections.scores(evaluation)]
        if config.diagnose:
            diagnosis = diagnose(config, dataset, evaluators, list(evaluation.records), tracker)
            texts.append(diagnosis.text())
            parts.append(sections.limits(diagnosis))
        rows = {"full" if config.ablation == FULL else "this ablation": evaluation}
        parts += [sections.thresholds(rows), *sections.of_one(evaluation)]
        write_page(config, "Evaluation", parts, selection, dataset, tracker)
    print("\n\n".join(texts))
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
    selection: Selection,
) -> Evaluation:
    """Score what `ablation` leaves of the network that the actors hold; write and log the results.

    Args:
        config: The whole run.
        ablation: What takes part.
        dataset: What the actors evaluate on.
        evaluators: They hold the network.
        out: Folder of the results.
        tracker: Of a run of their own.
        selection: Is offered every image.
    """
    began = time.perf_counter()
    evaluation = Evaluation.of(evaluators.records(ablation, selection=selection), dataset.classes)
    measured = {"wall_s": time.perf_counter() - began}
    paths = write_results(evaluation, out, provenance(asdict(config), dataset.digest) | measured)
    tracker.log_input("evaluation", config.data, dataset.digest, len(dataset), "evaluation")
    log_evaluation(tracker, evaluation, paths, measured)
    if shown := selection.same(NUM_PANELS):
        _log_panel(shown, dataset, out / _PANEL, tracker)
    return evaluation


def _log_panel(shown: Sequence[Shown], dataset: PreparedDataset, path: StoragePath, tracker: Tracker) -> None:
    """A picture that MLflow shows beside those of other runs."""
    samples = list(map(shrink, _samples_of(shown, dataset)))
    save_panel(path, samples, [one.predicted for one in shown], dataset.classes)
    tracker.log_artifact(path)
    tracker.log_image(path, "panel", 0, int(time.time() * 1000))


def _samples_of(shown: Sequence[Shown], dataset: PreparedDataset) -> Iterator[Sample]:
    indices = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    return read_ahead(dataset.__getitem__, [indices[one.record.image_id] for one in shown])


def log_evaluation(
    tracker: Tracker, evaluation: Evaluation, paths: Iterable[StoragePath], measured: Mapping[str, float] | None = None
) -> None:
    """Record the metrics, and others that were measured, the table of classes, and the files of a report in MLflow."""
    tracker.log_metrics({**evaluation.metrics(), **(measured or {})})
    rows = [{"class": row["class"], "ap_r_vol": row.get("sds/ap_r_vol"), **row} for row in per_class(evaluation)]
    tracker.log_table(rows, "classes")  # MLflow compares the second column, unless asked for another
    for path in paths:
        tracker.log_artifact(path)


def write_page(
    config: AblateConfig,
    title: str,
    parts: Sequence[Section],
    selection: Selection,
    dataset: PreparedDataset,
    tracker: Tracker,
) -> None:
    """Write the report with the gallery at its end, and log it."""
    began, shown = time.perf_counter(), selection.chosen()
    if shown:
        parts = [*parts, gallery(shown, _samples_of(shown, dataset), len(dataset), dataset.classes)]
    path = StoragePath.of(config.out) / REPORT
    save_page(path, f"{title}: {path.parent.name}", parts, facts(config, dataset))
    tracker.log_artifact(path)
    tracker.log_metrics({"report_s": time.perf_counter() - began})


def facts(config: AblateConfig, dataset: PreparedDataset) -> dict[str, str]:
    """Where the numbers of a page come from."""
    return {
        "data": f"{config.data}, {len(dataset)} images, {dataset.digest[:12]}",
        "network": config.checkpoint or "hand-set weights",
        "commit": commit() or "unknown",
    }
