"""The record of a run in MLflow, and what happens while MLflow cannot be reached.

Every event is first appended to a spool file (JSON lines) and removed once MLflow has taken it, so an outage,
or a driver that dies, delays the record instead of losing it. An event may reach the server twice; the second
time changes nothing. The file itself, even an empty one, says that the run has not been finished in MLflow.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from instseg.config import TrackingConfig
from instseg.jobs.mlflow_server import Server, resolve_uri

log = logging.getLogger(__name__)


class Tracker:
    """One MLflow run. Nothing here raises on account of MLflow: what cannot be logged is replayed later.

    May be pickled to another process, which then logs to the same run. A context manager; or call `finish`.
    """

    def __init__(self, server: Server, key: str, spool: Path) -> None:
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
        server = parent._server if parent else Server(config)
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

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0, time_ms: int | None = None) -> None:
        """Record numbers, by default as of now; the same numbers, step and time again change nothing."""
        values = {name: float(value) for name, value in metrics.items()}
        self._emit("metrics", time_ms=time_ms, metrics=values, step=step)

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

    def _emit(self, op: str, retry_now: bool = False, time_ms: int | None = None, **fields: Any) -> None:
        event = {"op": op, "key": self._key, "time_ms": time_ms or int(time.time() * 1000), **fields}
        with self._spool.open("a") as file:
            file.write(json.dumps(event) + "\n")
        self._flush(retry_now)

    def _flush(self, retry_now: bool = False) -> None:
        """Send the spool in order up to the first event that the server does not take."""
        if not self._spool.exists() or not (retry_now or self._server.worth_trying()):
            return
        events = _read_events(self._spool)
        num_sent = self._server.send(events, self._spool)
        if events and num_sent == len(events) and events[-1]["op"] == "finish":
            self._spool.unlink()
            return
        rest = self._spool.with_suffix(".tmp")
        rest.write_text("".join(json.dumps(event) + "\n" for event in events[num_sent:]))
        rest.replace(self._spool)


def how_to_open(config: TrackingConfig) -> str:
    """Return what to type, or which page to open, to see the runs."""
    uri = resolve_uri(config)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


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


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat
