"""The training driver: checks what it can before a worker starts, and owns the MLflow run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import training_images
from instseg.jobs.cluster import cluster, cluster_nodes
from instseg.jobs.devices import describe, training_device
from instseg.jobs.folder import check_folder
from instseg.jobs.tracking import Tracker
from instseg.jobs.train_checks import check_data, check_model, check_same_run
from instseg.jobs.train_fit import fit, log_epoch
from instseg.jobs.train_loop import training_settings
from instseg.models.checkpoint import Checkpoint, find_checkpoint, latest_checkpoint

_SPOOL = "mlflow_spool.jsonl"


def train(config: TrainConfig, parent: Tracker | None = None) -> Path:
    """Train to `num_epochs`, continuing from the run directory's latest checkpoint; do nothing if that is there.

    Uses the Ray cluster that this process is connected to, or the one at RAY_ADDRESS, or starts one on this machine
    for the time of the run.

    Args:
        config: The run.
        parent: Of the MLflow run, which is then named by the folder that the run directory is in.

    Returns:
        The folder of the latest checkpoint.

    Raises:
        FileNotFoundError: If the data directory is missing or not prepared.
        ValueError: If the data lacks what the configuration needs, the run directory holds another run, or the
            cluster has less than the workers need.
        OSError: If a checkpoint cannot be written.
        FloatingPointError: If the loss is not finite.
        JobError: If Ray does not start, or workers were killed more than `max_failures` times.
        ray.train.TrainingFailedError: If workers failed as often for another reason.
    """
    check_folder(Path(config.out))
    dataset = training_images(config)
    check_data(config, dataset)
    check_model(config.model, dataset.num_labels)
    config = _with_absolute_paths(config)
    run = Path(config.out)
    checkpoint = latest_checkpoint(run)
    if checkpoint is not None:
        check_same_run(checkpoint, training_settings(config, dataset))
    epoch = checkpoint.state["epoch"] if checkpoint else 0
    if epoch < config.num_epochs:
        _continue(config, dataset, checkpoint, parent)
    else:
        print(f"nothing to do: {run} has finished its {epoch} epochs", flush=True)
        if (run / _SPOOL).exists():  # MLflow could not be reached, or the driver was killed before it had logged all
            with _recorded(config, dataset, checkpoint, parent):
                pass
    checkpoint = find_checkpoint(run)
    print(f"latest checkpoint: {checkpoint.folder}", flush=True)
    return checkpoint.folder


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers have another current directory."""
    weights = config.model.semantic_weights
    if weights is not None and Path(weights).exists():
        config = replace(config, model=replace(config.model, semantic_weights=str(Path(weights).resolve())))
    return replace(config, data=str(Path(config.data).resolve()), out=str(Path(config.out).resolve()))


def _continue(
    config: TrainConfig, dataset: PreparedDataset, checkpoint: Checkpoint | None, parent: Tracker | None
) -> None:
    with cluster():
        config = _with_device(config)
        epoch = checkpoint.state["epoch"] if checkpoint else 0
        print(
            f"training on {len(dataset)} images, epochs {epoch + 1} to {config.num_epochs}, "
            f"{config.num_workers} workers on {config.device.upper()}s: {config.out}",
            flush=True,
        )
        with _recorded(config, dataset, checkpoint, parent) as tracker:
            fit(config, tracker, epoch)


def _with_device(config: TrainConfig) -> TrainConfig:
    """Decide what "auto" means in this cluster, and say so where that leaves a GPU without work."""
    nodes = cluster_nodes()
    device = training_device(config.device, config.num_workers, config.cpus_per_worker, nodes)
    num_gpus = sum(node.gpus for node in nodes)
    if config.device == "auto" and device == "cpu" and num_gpus:
        print(
            f"warning: training on CPUs, because {config.num_workers} workers need a GPU each and the cluster has "
            f"{describe(nodes)}. --num-workers {num_gpus} would use what is there, with {num_gpus} images a step; "
            "--device cpu is this without the warning",
            file=sys.stderr,
            flush=True,
        )
    return replace(config, device=device)


@contextmanager
def _recorded(
    config: TrainConfig, dataset: PreparedDataset, checkpoint: Checkpoint | None, parent: Tracker | None
) -> Iterator[Tracker]:
    """The MLflow run: first what the checkpoint knows of it, at the end the latest checkpoint itself."""
    run, settings = Path(config.out), training_settings(config, dataset)
    name = run.parent.name if parent else run.name
    with Tracker.start(config.tracking, name, settings, {"workflow": "train"}, run / _SPOOL, parent) as tracker:
        _log_records(tracker, checkpoint)
        yield tracker
        latest = find_checkpoint(run)
        _log_records(tracker, latest)  # workers that died after their last checkpoint have not reported it
        for name in ("model.safetensors", "config.json"):
            tracker.log_artifact(latest.folder / name)


def _log_records(tracker: Tracker, checkpoint: Checkpoint | None) -> None:
    for record in checkpoint.state.get("records", []) if checkpoint else []:
        log_epoch(tracker, record)
