"""The training driver: checks what it can before a worker starts, runs Ray Train, owns the MLflow run."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from instseg.config import ModelConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.jobs.cluster import cluster
from instseg.jobs.tracking import Tracker
from instseg.jobs.train_loop import LOG, log_line, train_loop, training_settings
from instseg.models.checkpoint import Checkpoint, find_checkpoint, latest_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.models.semantic import FCN8S, LOGITS

_SPOOL = "mlflow_spool.jsonl"
_STEPS_PER_POINT = 10  # of the curves in MLflow
# What may differ between a run and its continuation: where things are, and how long and how safely to go on.
_FREE = {"out", "data", "semantic_weights", "cpus_per_worker", "num_epochs", "max_failures", "keep_checkpoints"}


def train(config: TrainConfig) -> Path:
    """Train to `num_epochs`, continuing from the run directory's latest checkpoint; do nothing if that is there.

    Uses the Ray cluster that this process is connected to, or the one at RAY_ADDRESS, or starts one on this machine
    for the time of the run.

    Returns:
        The folder of the latest checkpoint.

    Raises:
        FileNotFoundError: If the data directory is missing or not prepared.
        ValueError: If the data lacks what the configuration needs, or the run directory holds another run.
        ray.train.TrainingFailedError: If workers failed more than `max_failures` times.
    """
    dataset = PreparedDataset(config.data)
    _check_data(config, dataset)
    _check_model(config.model, dataset.num_labels)
    config = _with_absolute_paths(config)
    run, settings = Path(config.out), training_settings(config, dataset)
    checkpoint = latest_checkpoint(run)
    if checkpoint is not None:
        _check_same_run(checkpoint, settings)
    epoch = checkpoint.state["epoch"] if checkpoint else 0
    if epoch < config.num_epochs:
        print(f"training on {len(dataset)} images, epochs {epoch + 1} to {config.num_epochs}: {run}", flush=True)
        _run(config, settings)
    else:
        print(f"nothing to do: {run} has finished its {epoch} epochs", flush=True)
    checkpoint = find_checkpoint(run)
    print(f"latest checkpoint: {checkpoint.folder}", flush=True)
    return checkpoint.folder


def _check_data(config: TrainConfig, dataset: PreparedDataset) -> None:
    if len(dataset) == 0:
        raise ValueError(f"data directory {config.data}: has no images")
    sample = dataset[0]
    if sample.semantic is None or sample.instances is None:
        raise ValueError(f"data directory {config.data}: has no ground truth to train on")
    if config.model.semantic != LOGITS:
        return
    if sample.logits is None:
        advice = "prepare it with --logits, or choose a semantic network with --model.semantic"
        raise ValueError(f"data directory {config.data}: has no logits; {advice}")
    if len(sample.logits) != dataset.num_labels:
        got = f"logits of {len(sample.logits)} labels, expected {dataset.num_labels}"
        raise ValueError(f"data directory {config.data}: {got}")


def _check_model(config: ModelConfig, num_labels: int) -> None:
    with torch.device("meta"):  # takes no time and no memory
        InstanceNetwork(replace(config, semantic_weights=None), num_labels)
    weights = config.semantic_weights
    if config.semantic == FCN8S and weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"model.semantic_weights: no file {weights}")


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers have another current directory."""
    weights = config.model.semantic_weights
    if weights is not None and Path(weights).exists():
        config = replace(config, model=replace(config.model, semantic_weights=str(Path(weights).resolve())))
    return replace(config, data=str(Path(config.data).resolve()), out=str(Path(config.out).resolve()))


def _check_same_run(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    before, now = _leaves(checkpoint.config), _leaves(settings)
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            raise ValueError(
                f"out: {checkpoint.folder.parents[1]} was trained with {name} = {old!r}, not {new!r}; "
                "use the same value to continue, or another --out"
            )


def _leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        elif name not in _FREE:
            leaves[prefix + name] = value
    return leaves


def _run(config: TrainConfig, settings: dict[str, Any]) -> None:
    run = Path(config.out)
    tags = {"workflow": "train"}
    with (
        Tracker.start(config.tracking, run.name, settings, tags, run / _SPOOL) as tracker,
        cluster(config.num_workers * config.cpus_per_worker),
    ):
        _fit(config, tracker)
        folder = find_checkpoint(run).folder
        for name in ("model.safetensors", "config.json"):
            tracker.log_artifact(folder / name)


def _fit(config: TrainConfig, tracker: Tracker) -> None:
    ray_folder = Path(config.out) / "ray"
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=ray.cluster_resources().get("GPU", 0) >= config.num_workers,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=ray_folder.name,
            storage_path=config.out,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[_Report(tracker, config)],
        ),
    )
    try:
        with _show(Path(config.out) / LOG):
            trainer.fit()
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


@contextmanager
def _show(log: Path) -> Iterator[None]:
    """Print what workers and controller append to the log. Ray's own forwarding brings its internals' noise along."""
    log.touch()
    done = threading.Event()

    def forward(file: TextIO) -> None:
        finished = False
        while not finished:
            finished = done.wait(0.5)
            print(file.read(), end="", flush=True)

    with log.open() as file:
        file.seek(0, os.SEEK_END)
        thread = threading.Thread(target=forward, args=(file,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Report(ray.train.UserCallback):
    """Records each epoch. It lives in Ray Train's controller, a process on the driver's machine."""

    def __init__(self, tracker: Tracker, config: TrainConfig) -> None:
        self.tracker = tracker
        self.config = config

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Average over the workers, which all take equally many steps."""
        first = metrics[0]
        curves = {name: _mean_curve(metrics, name) for name in ("semantic_loss", "instance_loss")}
        num_steps = len(curves["semantic_loss"])
        for begin in range(0, num_steps, _STEPS_PER_POINT):
            end = min(begin + _STEPS_PER_POINT, num_steps)
            point = {name: sum(curve[begin:end]) / (end - begin) for name, curve in curves.items()}
            self.tracker.log_metrics(point, first["step"] - num_steps + end)
        epoch = {f"epoch_{name}": sum(curve) / num_steps for name, curve in curves.items()}
        epoch["images_per_second"] = num_steps * len(metrics) / first["seconds"]
        self.tracker.log_metrics(epoch, first["step"])
        log_line(
            self.config.out,
            f"epoch {first['epoch']}/{self.config.num_epochs} done, step {first['step']}: "
            f"semantic loss {epoch['epoch_semantic_loss']:.4f}, instance loss {epoch['epoch_instance_loss']:.4f}, "
            f"{epoch['images_per_second']:.2f} images/s",
        )

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Name the worker that failed; Ray Train restarts all of them from the latest checkpoint."""
        for rank, error in worker_exceptions.items():
            log_line(self.config.out, f"worker {rank} failed: {str(error).strip().splitlines()[-1]}")


def _mean_curve(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [sum(losses) / len(metrics) for losses in zip(*(worker[name] for worker in metrics), strict=True)]
