"""MLflow, the only module that imports it, and what happens while it cannot be reached.

Every event is first appended to a spool file (JSON lines) and removed once MLflow has taken it, so an outage,
or a driver that dies, delays the record instead of losing it. An event may reach the server twice; the second
time changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from instseg.config import TrackingConfig

RUN_KEY = "instseg.run_key"  # the tag by which a run is found again
RETRY_SECONDS = 30.0  # how long a server that did not answer is left alone
PARAMS_PER_CALL = 100  # MLflow's limit

log = logging.getLogger(__name__)


class Tracker:
    """One MLflow run. Nothing here raises on account of MLflow: what cannot be logged is replayed later.

    May be pickled to another process, which then logs to the same run. A context manager; or call `finish`.
    """

    def __init__(self, server: _Server, key: str, spool: Path) -> None:
        self._server = server
        self._key = key
        self._spool = spool

    @staticmethod
    def start(
        config: TrackingConfig,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        spool: str | os.PathLike[str],
        parent: Tracker | None = None,
        resume: bool = True,
    ) -> Tracker:
        """Create the run (and database and experiment), after replaying what an earlier run left in `spool`.

        Args:
            config: Where to record.
            run_name: Shown in MLflow.
            params: Flattened with dots when nested.
            tags: Further tags of the run.
            spool: JSON-lines file in the run directory. The key of a resumable run is kept beside it.
            parent: Makes this a nested run. May share the parent's spool if it is not to be resumed.
            resume: Continue the run that was started with this spool before, found by its tag. A run
                directory that was deleted in between gets a new run.
        """
        spool = Path(spool).absolute()
        spool.parent.mkdir(parents=True, exist_ok=True)
        server = parent._server if parent else _Server(config)
        tracker = Tracker(server, _run_key(spool, resume), spool)
        tracker._flush(retry_now=True)
        tracker._emit(
            "start",
            name=run_name,
            params=_flatten(params),
            tags=dict(tags),
            parent=parent._key if parent else None,
        )
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as MLflow has not answered."""
        return self._server.run_ids.get(self._key)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers; the same step again overwrites nothing but is shown at the same place."""
        self._emit("metrics", metrics={name: float(value) for name, value in metrics.items()}, step=step)

    def log_artifact(self, path: str | os.PathLike[str]) -> None:
        """Copy a file to the run. The file must stay where it is until MLflow has answered."""
        self._emit("artifact", path=str(Path(path).absolute()))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._emit("finish", retry_now=True, status=status)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        killed = kind is not None and not issubclass(kind, Exception)
        self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _emit(self, op: str, retry_now: bool = False, **fields: Any) -> None:
        event = {"op": op, "key": self._key, "time_ms": int(time.time() * 1000), **fields}
        with self._spool.open("a") as file:
            file.write(json.dumps(event) + "\n")
        self._flush(retry_now)

    def _flush(self, retry_now: bool = False) -> None:
        """Send the spool in order up to the first event that the server does not take."""
        if not self._spool.exists() or not (retry_now or self._server.worth_trying()):
            return
        events = _read_events(self._spool)
        num_sent = self._server.send(events, self._spool)
        if num_sent == len(events):
            self._spool.unlink()
            return
        rest = self._spool.with_suffix(".tmp")
        rest.write_text("".join(json.dumps(event) + "\n" for event in events[num_sent:]))
        rest.replace(self._spool)


class _Server:
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
        return time.time() >= self._retry_at

    def send(self, events: list[dict[str, Any]], spool: Path) -> int:
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

    def _fail(self, error: Exception, spool: Path) -> None:
        self._client = None
        self._retry_at = time.time() + RETRY_SECONDS
        if not self._warned:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            log.warning(
                "MLflow at %s cannot be reached (%s). The work goes on; what is not logged waits in %s",
                self.uri,
                reason,
                spool,
            )
        self._warned = True

    def _apply(self, event: dict[str, Any]) -> None:
        with _quiet():
            self._connect()
            match event["op"]:
                case "start":
                    self._start(event)
                case "metrics":
                    self._log_metrics(event)
                case "artifact":
                    self._log_artifact(event)
                case "finish":
                    self._client.set_terminated(self._run_id(event["key"]), event["status"], event["time_ms"])

    def _connect(self) -> None:
        if self._client is not None:
            return
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise RuntimeError(f"experiment {self.experiment!r} is deleted; restore it or choose another name")
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
        if not Path(event["path"]).is_file():
            raise FileNotFoundError(f"{event['path']} is gone")
        self._client.log_artifact(self._run_id(event["key"]), event["path"])


def resolve_uri(config: TrackingConfig) -> str:
    """Return the configured URI, else MLFLOW_TRACKING_URI, else mlflow.db in the current directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):  # absolute, because Ray's workers change directory
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def how_to_open(config: TrackingConfig) -> str:
    """Return what to type, or which page to open, to see the runs."""
    uri = resolve_uri(config)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def _artifact_location(uri: str) -> str | None:
    # MLflow's own default for SQLite is ./mlruns, wherever the process happens to run.
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def _run_key(spool: Path, resume: bool) -> str:
    """Key of the run. It lives in the run directory: a fresh directory of the same name is a new run."""
    key, path = uuid.uuid4().hex, spool.with_suffix(".key")
    if resume and not path.exists():
        path.write_text(key)
    return path.read_text() if resume else key


def _read_events(spool: Path) -> list[dict[str, Any]]:
    events = []
    for line in spool.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:  # a process was killed while writing its last line
            log.warning("%s: a torn line was left out: %.80s", spool, line)
    return events


def _is_rejected(error: Exception) -> bool:
    """Whether trying again can never help."""
    codes = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in codes


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


@contextmanager
def _quiet() -> Iterator[None]:
    """Use MLflow without its log lines, warnings, telemetry and minutes of retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
