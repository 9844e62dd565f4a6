"""Ray Train's part of a training: workers, their failures, and what they report at each checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from instseg.config import TrainConfig
from instseg.jobs.cluster import JobError
from instseg.jobs.run_log import RunLog, in_words, shown
from instseg.jobs.system_metrics import SystemMonitor
from instseg.jobs.tracking import Tracker
from instseg.jobs.train_loop import train_loop
from instseg.jobs.train_report import raise_failed_step
from instseg.jobs.train_worker import Loop
from instseg.jobs.validator import Validator, log_validations, validating
from instseg.models.checkpoint import FOLDER
from instseg.storage import StoragePath

# Ray Train's own list of the run's checkpoints, beside them. It refuses to start where the list and the folder differ,
# as after a crash; what is there is read off the folder instead.
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


def fit(config: TrainConfig, settings: dict[str, Any], tracker: Tracker, step: int) -> None:
    """Train in workers of the running cluster, on `config.device`; print their log, record the steps after `step`.

    Args:
        config: The run, paths absolute.
        settings: `training_settings`, for the checkpoints.
        tracker: Of the MLflow run.
        step: The latest that is recorded there.

    Raises:
        ValueError, OSError: As the worker did.
        FloatingPointError: If a loss or the gradient was not finite.
        JobError: If a worker's process died.
        KeyboardInterrupt: On Ctrl-C.
        ray.train.TrainingFailedError: With the worker's traceback, whatever else it was.
    """
    run = StoragePath.of(config.out)
    filesystem, path = run.filesystem
    (run / FOLDER / _RAY_SNAPSHOT).delete()
    fewest, most = config.worker_range
    try:
        with shown() as log, validating(run, config.validation, log) as validator, _interruptible():
            TorchTrainer(
                train_loop,
                train_loop_config={"loop": Loop(config, settings, log)},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=fewest if fewest == most else (fewest, most),
                    use_gpu=config.device == "gpu",
                    resources_per_worker={"CPU": config.cpus_per_worker},
                ),
                run_config=ray.train.RunConfig(
                    name=FOLDER,
                    storage_path=path,
                    storage_filesystem=filesystem,
                    # Workers of nodes that were reclaimed are replaced without limit, and count as no failures.
                    failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                    callbacks=[_Report(config, tracker, log, validator, step)],
                ),
            ).fit()
    except ray.train.TrainingFailedError as error:
        raise _reason(error) from error
    raise_failed_step(run)


def log_record(tracker: Tracker, record: dict[str, Any]) -> None:
    """Log what `train_loop` recorded of the steps before a checkpoint. Once more changes nothing."""
    points = record["points"]
    if "losses" in record:  # the end of an epoch
        epoch = {f"epoch_{name}": loss for name, loss in record["losses"].items()}
        points = [*points, (record["step"], epoch | {"images_per_second": record["images_per_second"]})]
    tracker.log_points(points, record["time_ms"])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt: Ray Train takes charge of the signal, and leaves."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as leaving:
        if leaving.code not in (0, 1):  # by another signal; Ray's handler leaves with 0, of which its `get` makes 1
            raise
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)


def _reason(failed: ray.train.TrainingFailedError) -> Exception:
    """What a person can act on: the worker's own error, or that its process died. Else the failure as it is."""
    errors: list[Exception] = list(getattr(failed, "worker_failures", {}).values())
    errors = errors or [getattr(failed, "controller_failure", failed)]
    for error in errors:
        if isinstance(error, (ValueError, OSError)):
            return error
    if all(type(error).__module__.startswith("ray.") for error in errors):
        return JobError(f"training failed: {_last_line(errors[0])}")
    return failed


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


class _Report(ray.train.UserCallback):
    """Records the steps. It lives in Ray Train's controller, a process on the driver's machine."""

    def __init__(self, config: TrainConfig, tracker: Tracker, log: RunLog, validator: Validator, step: int) -> None:
        self.config = config
        self.tracker = tracker
        self.log = log
        self.validator = validator
        self.step = step  # the latest that is recorded
        self.validated: set[str] = set()  # checkpoints whose validation is recorded
        self.monitor: SystemMonitor | None = None  # made where it is used, in the controller

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Every worker reports the same; workers that died between saving and reporting left a record to the next."""
        for record in metrics[0]["records"]:
            if record["step"] > self.step:
                self.step = record["step"]
                self._log(record)
                self.monitor = self.monitor or SystemMonitor()
                self.tracker.log_metrics(self.monitor.sample(), self.step)
        self.validator.catch_up()
        log_validations(self.tracker, self.config.out, self.validated)

    def _log(self, record: dict[str, Any]) -> None:
        log_record(self.tracker, record)
        if "losses" in record:
            done = f"epoch {record['epoch']}/{self.config.num_epochs} done, step {record['step']}"
            self.log.line(
                f"{done}: {in_words(record['losses'])}, "
                f"{record['images_per_second']:.2f} images/s, data wait {record['data_wait_ms']:.1f} ms a step"
            )

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Name the worker that failed; Ray Train restarts all of them from the latest checkpoint."""
        for rank, error in worker_exceptions.items():
            self.log.line(f"worker {rank} failed: {_last_line(error)}")
