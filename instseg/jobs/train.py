"""The training driver: checks what it can before a worker starts, and owns the MLflow run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import training_images
from instseg.jobs.cluster import cluster, cluster_nodes
from instseg.jobs.devices import describe, training_device
from instseg.jobs.ending import command, end
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.tracking import SPOOL, Tracker, how_to_open
from instseg.jobs.train_checks import (
    check_data,
    check_model,
    check_same_run,
    check_start,
    check_validation,
    training_settings,
)
from instseg.jobs.train_fit import fit, log_record
from instseg.jobs.validate import validation_images
from instseg.jobs.validations import best, catch_up, due, records, stopped
from instseg.jobs.validator import in_words, log_validation_data, log_validations
from instseg.models.checkpoint import FOLDER, Checkpoint, find_checkpoint, latest_checkpoint
from instseg.models.semantic import weights_file
from instseg.storage import StoragePath


def train(config: TrainConfig, parent: Tracker | None = None) -> StoragePath:
    """Train to `num_epochs`, continuing from the run directory's latest checkpoint; do nothing if that is there.

    Only without one does the run begin with `start_from`.

    Uses the Ray cluster that this process is connected to, or the one at RAY_ADDRESS, or starts one on this machine
    for the time of the run.

    Args:
        config: The run.
        parent: Of the MLflow run, which is then named by the folder that the run directory is in.

    Returns:
        The folder of the latest checkpoint.

    Raises:
        FileNotFoundError: If the data directory is missing or not prepared, or the checkpoint to start from is.
        ValueError: If the data lacks what the configuration needs, the run directory holds another run, or the
            cluster has less than the workers need.
        OSError: If a checkpoint cannot be written.
        FloatingPointError: If a loss or the gradient is not finite; names the images, and the folder with the state
            before that step.
        JobError: If Ray does not start, or workers were killed more than `max_failures` times.
        ray.train.TrainingFailedError: If workers failed as often for another reason.
    """
    check_inputs(data=config.data, validation_data=config.validation.data)
    run = check_out(config.out)
    check_out(run / FOLDER)
    dataset = training_images(config)
    check_data(config, dataset)
    check_model(config.model, dataset.num_labels)
    if config.validation.data is not None:
        check_validation(dataset, validation_images(config.validation))
    config = _with_absolute_paths(config)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        config = check_start(config, dataset)
    settings = training_settings(config, dataset)
    if checkpoint is not None:
        check_same_run(checkpoint, settings)
    epoch = checkpoint.state["epoch"] if checkpoint else 0
    if epoch < config.num_epochs and not stopped(run, config.validation):
        _continue(config, dataset, checkpoint, parent)
    else:
        early = "" if epoch >= config.num_epochs else f" of {config.num_epochs}, as validation.patience asks"
        print(f"nothing to do: {run} has finished its {epoch} epochs{early}", flush=True)
        waiting = due(run, config.validation)
        # MLflow could not be reached, or the driver was killed before it had logged all.
        if waiting or (run / SPOOL).size() is not None:
            with _recorded(config, dataset, settings, checkpoint, parent):
                for record in catch_up(run, config.validation):
                    print(in_words(record), flush=True)
    checkpoint = find_checkpoint(run)
    if parent is None:
        data = config.validation.data or "FOLDER"
        following = command("evaluate", data=data, checkpoint=run, out="FOLDER")
        end(checkpoint.folder, following=[following], mlflow=how_to_open(config.tracking))
    return checkpoint.folder


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers have another current directory."""
    if (weights := weights_file(config.model.semantic_weights)) is not None:
        config = replace(config, model=replace(config.model, semantic_weights=str(weights)))
    if config.validation.data is not None:
        validation = replace(config.validation, data=str(StoragePath.of(config.validation.data)))
        config = replace(config, validation=validation)
    return replace(config, data=str(StoragePath.of(config.data)), out=str(StoragePath.of(config.out)))


def _continue(
    config: TrainConfig, dataset: PreparedDataset, checkpoint: Checkpoint | None, parent: Tracker | None
) -> None:
    with cluster():
        places = {"data": StoragePath.of(config.data), "out": StoragePath.of(config.out)}
        if checkpoint is None and config.start_from is not None:
            places["start_from"] = StoragePath.of(config.start_from)
        if config.validation.data is not None:
            places["validation_data"] = StoragePath.of(config.validation.data)
        weights = weights_file(config.model.semantic_weights)
        check_nodes(**places, model_semantic_weights=weights)
        config = _with_device(config)
        state = checkpoint.state if checkpoint else {"epoch": 0}
        after = f" (from its image {images + 1} on)" if (images := state.get("images")) else ""
        print(
            f"training on {len(dataset)} images, epochs {state['epoch'] + 1}{after} to {config.num_epochs}, "
            f"{config.num_workers} workers on {config.device.upper()}s: {config.out}",
            flush=True,
        )
        settings = training_settings(config, dataset)  # now that the device is known
        with _recorded(config, dataset, settings, checkpoint, parent) as tracker:
            fit(config, settings, tracker, state.get("step", 0))


def _with_device(config: TrainConfig) -> TrainConfig:
    """Decide what "auto" means in this cluster, and say so where that leaves a GPU without work.

    Raises:
        ValueError: If the cluster has less than the workers need.
    """
    nodes = cluster_nodes()
    num_workers, _ = config.worker_range
    device = training_device(config.device, num_workers, config.cpus_per_worker, nodes)
    num_gpus = sum(node.gpus for node in nodes)
    if config.device == "auto" and device == "cpu" and num_gpus:
        print(
            f"warning: training on CPUs, because {num_workers} workers need a GPU each and the cluster has "
            f"{describe(nodes)}. --num-workers {num_gpus} would use what is there, with {num_gpus} images a step; "
            "--device cpu is this without the warning",
            file=sys.stderr,
            flush=True,
        )
    return replace(config, device=device)


@contextmanager
def _recorded(
    config: TrainConfig,
    dataset: PreparedDataset,
    settings: dict[str, Any],
    checkpoint: Checkpoint | None,
    parent: Tracker | None,
) -> Iterator[Tracker]:
    """The MLflow run: first what the checkpoint knows of it, at the end its best or latest checkpoint as a model."""
    run = StoragePath.of(config.out)
    name = run.parent.name if parent else run.name
    tags = {"workflow": "train", "mlflow.source.git.commit": settings["provenance"]["commit"] or "unknown"}
    with Tracker.start(config.tracking, name, settings, tags, run / SPOOL, parent) as tracker:
        tracker.log_input("training", config.data, dataset.digest, len(dataset), "training")
        log_validation_data(tracker, config.validation)
        _log_records(tracker, checkpoint)
        yield tracker
        latest = find_checkpoint(run)
        _log_records(tracker, latest)  # workers that died after their last checkpoint have not reported it
        log_validations(tracker, run, set())
        winner = best(records(run), config.validation.metric)
        chosen = run / FOLDER / winner["checkpoint"] if winner else latest.folder
        if parent is None:  # a fold of a cross-validation is not for use
            tracker.log_model(chosen, config.tracking.registered_model)


def _log_records(tracker: Tracker, checkpoint: Checkpoint | None) -> None:
    for record in checkpoint.state.get("records", []) if checkpoint else []:
        log_record(tracker, record)
