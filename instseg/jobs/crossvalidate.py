"""Cross-validation of a recipe: every image is scored by a network that was trained without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from instseg.config import AblateConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import read_json, write_json
from instseg.data.folds import split_folds
from instseg.evaluation.records import RECORDS, read_records, write_records
from instseg.jobs.ablate import write_ablation
from instseg.jobs.cluster import cluster
from instseg.jobs.ending import command, end
from instseg.jobs.evaluate import log_evaluation, running_evaluators
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.tracking import SPOOL, Tracker, how_to_open
from instseg.jobs.train import train
from instseg.jobs.train_checks import check_data, check_model, check_same_settings, training_settings
from instseg.report.ablation import AblationRow, rows_of
from instseg.report.page import REPORT, save_page
from instseg.report.provenance import commit, provenance
from instseg.report.results import write_results
from instseg.report.tables import Evaluation
from instseg.storage import StoragePath

_TAGS = {"workflow": "crossvalidate"}


def crossvalidate(config: TrainConfig) -> dict[str, Evaluation]:
    """Train without each fold in turn, evaluate all rows on it, and score the records of all folds together.

    Writes for fold k its run directory `fold_<k>/run` and the records `fold_<k>/<row>/records.arrow`, then a report of
    all images for each row, and the rows side by side. What is there and intact is not done again.

    Args:
        config: The training of each fold; `out` holds all of it, and `held_out` is None.

    Returns:
        The evaluations of all images, by row.

    Raises:
        ValueError: If `out` has folds of another cross-validation, or there cannot be so many folds; else as `train`
            and `evaluate`, as are all other errors.
    """
    out = check_out(config.out)
    check_inputs(data=config.data)
    if config.held_out is not None:
        raise ValueError(
            f"held_out: expected none, as each fold is held out in turn, got {config.held_out}; leave it out"
        )
    dataset = PreparedDataset(config.data)
    check_data(config, dataset)
    check_model(config.model, dataset.num_labels)
    folds = split_folds(dataset.image_ids, config.num_folds, config.fold_seed)
    settings = training_settings(config, dataset)
    _claim(out, settings | {"folds": {dataset.image_ids[i]: k for k, fold in enumerate(folds) for i in fold}})
    with cluster(), Tracker.start(config.tracking, out.name, settings, _TAGS, out / SPOOL) as parent:
        check_nodes(data=dataset.root, out=out)
        _run_folds(config, dataset, folds, parent)
        evaluations = {row.name: _pool(config, row, dataset, parent) for row in rows_of(config.model)}
        parts = write_ablation(evaluations, out, parent)
        known = {
            "data": f"{config.data}, {len(dataset)} images",
            "folds": f"{len(folds)}",
            "commit": commit() or "unknown",
        }
        save_page(out / REPORT, f"Cross-validation: {out.name}", parts, known)
        parent.log_artifact(out / REPORT)
    end(out, (REPORT, "ablation.md"), [command("compare", str(out))], how_to_open(config.tracking))
    return evaluations


def _claim(out: StoragePath, settings: dict[str, Any]) -> None:
    """Make `out` the folder of these settings and folds; ValueError if it has folds of others."""
    path = out / "crossvalidation.json"
    if any(name.startswith("fold_") for name in out.folders()):
        check_same_settings(out, read_json(path), settings)
    else:
        write_json(path, settings)


def _run_folds(
    config: TrainConfig, dataset: PreparedDataset, folds: Sequence[tuple[int, ...]], parent: Tracker
) -> None:
    """Run the folds that lack records; say before each what it is and how long the rest may take."""
    lacking = [
        k
        for k in range(len(folds))
        if not all(_has_records(_records_path(config, k, row)) for row in rows_of(config.model))
    ]
    estimate = ""
    for num_done, fold in enumerate(lacking):
        began, held_out = time.monotonic(), dataset.subset(folds[fold])
        doing = f"training on {len(dataset) - len(held_out)} images, evaluating on the {len(held_out)} others"
        print(f"fold {fold} ({num_done + 1} of {len(lacking)} to do): {doing}{estimate}", flush=True)
        _run_fold(config, fold, held_out, parent)
        minutes = (time.monotonic() - began) / 60
        left = minutes * (len(lacking) - num_done - 1)
        estimate = f"; the last fold took {minutes:.1f} min, the rest will take about {left:.1f}"


def _run_fold(config: TrainConfig, fold: int, held_out: PreparedDataset, parent: Tracker) -> None:
    """Train on all other images, then write the records of those held out."""
    folder = StoragePath.of(config.out) / f"fold_{fold}"
    checkpoint = train(replace(config, held_out=fold, out=str(folder / "run")), parent)
    evaluation = AblateConfig(config.data, str(folder), str(checkpoint), device=config.device)
    with running_evaluators(evaluation, held_out) as (_, evaluators):
        for row in rows_of(config.model):
            path = _records_path(config, fold, row)
            if not _has_records(path):
                write_records(path, evaluators.records(row.ablation))


def _pool(config: TrainConfig, row: AblationRow, dataset: PreparedDataset, parent: Tracker) -> Evaluation:
    """Score the records of all folds once; write and log the report."""
    records = [record for fold in range(config.num_folds) for record in read_records(_records_path(config, fold, row))]
    evaluation = Evaluation.of(records, dataset.classes)
    out = StoragePath.of(config.out) / row.name
    paths = write_results(evaluation, out, provenance(asdict(replace(config, ablation=row.ablation)), dataset.digest))
    params = {"ablation": asdict(row.ablation)}
    with Tracker.start(config.tracking, row.name, params, _TAGS, out / SPOOL, parent) as tracker:
        log_evaluation(tracker, evaluation, paths)
    return evaluation


def _has_records(path: StoragePath) -> bool:
    """Whether there is a file of records that can be read; a damaged one is as good as none."""
    try:
        read_records(path)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _records_path(config: TrainConfig, fold: int, row: AblationRow) -> StoragePath:
    return StoragePath.of(config.out) / f"fold_{fold}" / row.name / RECORDS
