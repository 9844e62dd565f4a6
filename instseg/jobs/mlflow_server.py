"""The connection to an MLflow server that may fail at any time."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instseg.config import TrackingConfig
from instseg.jobs.mlflow_events import LOG
from instseg.jobs.mlflow_model import log_model
from instseg.storage import StoragePath

RUN_KEY = "instseg.run_key"  # the tag by which a run is found again
RETRY_SECONDS = 30.0  # how long a server that did not answer is left alone
PARAMS_PER_CALL = 100  # MLflow's limit

log = logging.getLogger(__name__)


class _DeletedExperimentError(Exception):
    """There is an experiment of that name, but MLflow takes nothing for it."""


class Server:
    """A connection to MLflow that may fail at any time. Applying an event a second time is harmless."""

    def __init__(self, config: TrackingConfig) -> None:
        self.uri = resolve_uri(config)
        self.experiment = config.experiment
        self.run_ids: dict[str, str] = {}
        self._client: Any = None
        self._experiment_id = ""
        self._retry_at = 0.0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def worth_trying(self) -> bool:
        """Whether the last failure is long enough ago."""
        return time.time() >= self._retry_at

    def send(self, events: list[dict[str, Any]], spool: StoragePath) -> int:
        """Apply events until one fails; how many are done with."""
        for index, event in enumerate(events):
            try:
                self._apply(event)
            except Exception as error:  # MLflow, SQLAlchemy, requests and the OS raise unrelated types
                if _is_rejected(error):
                    log.warning("MLflow does not accept %s: %s", event, error)
                    continue
                self._fail(error, spool)
                return index
        return len(events)

    def _fail(self, error: Exception, spool: StoragePath) -> None:
        self._client = None
        self._retry_at = time.time() + RETRY_SECONDS
        if not self._warned:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            if not isinstance(error, _DeletedExperimentError):
                reason = f"cannot be reached ({reason})"
            log.warning(
                "MLflow at %s %s. The work goes on; what is not logged waits in %s, for the next run with this --out",
                self.uri,
                reason,
                spool,
            )
        self._warned = True

    def _apply(self, event: dict[str, Any]) -> None:
        with quiet():
            self._connect()
            match event["op"]:
                case "start":
                    self._start(event)
                case "metrics":
                    self._log_metrics(event)
                case "artifact":
                    self._log_artifact(event)
                case "input" | "image" | "table" as kind:
                    LOG[kind](self._client, self._run_id(event["key"]), event)
                case "model":
                    place, run_id = StoragePath.of(event["path"]), self._run_id(event["key"])
                    log_model(self._client, self._experiment_id, run_id, place, event["registered"])
                case "finish":
                    self._client.set_terminated(self._run_id(event["key"]), event["status"], event["time_ms"])

    def _connect(self) -> None:
        if self._client is not None:
            return
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise _DeletedExperimentError(
                f"has deleted the experiment {self.experiment!r}: restore it ({restore}), or choose another name with "
                "--tracking.experiment"
            )
        self._experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(self.experiment, artifact_location=_artifact_location(self.uri))
        )
        self._client = client

    def _find(self, key: str) -> str | None:
        if key not in self.run_ids:
            for run in self._client.search_runs([self._experiment_id], f"tags.`{RUN_KEY}` = '{key}'"):
                self.run_ids[key] = run.info.run_id
        return self.run_ids.get(key)

    def _run_id(self, key: str) -> str:
        run_id = self._find(key)
        if run_id is None:
            raise LookupError(f"no run with tag {RUN_KEY} = {key} in experiment {self.experiment!r}")
        return run_id

    def _start(self, event: dict[str, Any]) -> None:
        run_id = self._find(event["key"])
        if run_id is None:
            tags = {**event["tags"], RUN_KEY: event["key"]}
            if event["parent"]:
                tags["mlflow.parentRunId"] = self._run_id(event["parent"])
            run = self._client.create_run(self._experiment_id, event["time_ms"], tags, event["name"])
            run_id = self.run_ids[event["key"]] = run.info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._log_params(run_id, event["params"])

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params  # MLflow refuses to change a parameter on resuming
        new = [Param(name, value) for name, value in params.items() if name not in known]
        for begin in range(0, len(new), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=new[begin : begin + PARAMS_PER_CALL])

    def _log_metrics(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        items = event["metrics"].items()
        metrics = [Metric(name, value, event["time_ms"], event["step"]) for name, value in items]
        self._client.log_batch(self._run_id(event["key"]), metrics=metrics)

    def _log_artifact(self, event: dict[str, Any]) -> None:
        with StoragePath.of(event["path"]).on_disk() as path:
            path.stat()  # what is gone is gone, and no reason to try again
            self._client.log_artifact(self._run_id(event["key"]), str(path))


def resolve_uri(config: TrackingConfig) -> str:
    """Return the configured URI, else MLFLOW_TRACKING_URI, else mlflow.db in the current directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):  # absolute, because Ray's workers change directory
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def _artifact_location(uri: str) -> str | None:
    # MLflow's own default for SQLite is ./mlruns, wherever the process happens to run.
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def _is_rejected(error: Exception) -> bool:
    """Whether trying again can never help."""
    codes = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in codes


@contextmanager
def quiet() -> Iterator[None]:
    """Use MLflow without its log lines, warnings, telemetry and minutes of retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("mlflow.store.db.utils", "mlflow.pyfunc", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
