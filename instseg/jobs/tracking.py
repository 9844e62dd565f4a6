"""The record of a run in MLflow, and what happens while MLflow cannot be reached.

What MLflow does not take waits in a spool file (JSON lines) in the run directory, so an outage delays the record
instead of losing it. An event may reach the server twice; the second time changes nothing. The file itself, even an
empty one, says that the run has not been finished in MLflow.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from instseg.config import TrackingConfig
from instseg.jobs.mlflow_server import Server, resolve_uri
from instseg.report.provenance import flatten
from instseg.storage import Place, StoragePath

SPOOL = "mlflow_spool.jsonl"
log = logging.getLogger(__name__)


class Tracker:
    """One MLflow run. Nothing here raises on account of MLflow: what cannot be logged is replayed later.

    May be pickled to another process, which then logs to the same run. A context manager; or call `finish`.
    """

    def __init__(self, server: Server, key: str, spool: StoragePath) -> None:
        self._server = server
        self._key = key
        self._spool = spool

    @staticmethod
    def start(
        config: TrackingConfig,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        spool: Place,
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
        place = StoragePath.of(spool)
        server = parent._server if parent else Server(config)
        tracker = Tracker(server, _run_key(place, resume), place)
        tracker._emit(
            tracker._event(
                "start",
                name=run_name,
                params=flatten(params),
                tags=dict(tags),
                parent=parent._key if parent else None,
            ),
            retry_now=True,
        )
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as MLflow has not answered."""
        return self._server.run_ids.get(self._key)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0, time_ms: int | None = None) -> None:
        """Record numbers, by default as of now; the same numbers, step and time again change nothing."""
        self.log_points([(step, metrics)], time_ms)

    def log_points(self, points: Iterable[tuple[int, Mapping[str, float]]], time_ms: int | None = None) -> None:
        """Record numbers of several steps."""
        rows = [(step, {name: float(value) for name, value in metrics.items()}) for step, metrics in points]
        self._emit(*(self._event("metrics", time_ms, metrics=metrics, step=step) for step, metrics in rows))

    def log_artifact(self, place: Place) -> None:
        """Copy a file to the run. The file must stay where it is until MLflow has answered."""
        self._emit(self._event("artifact", path=str(StoragePath.of(place))))

    def log_input(self, name: str, place: Place, digest: str, num_images: int, context: str) -> None:
        """Record a data set that the run reads.

        Args:
            name: Shown in MLflow.
            place: Where it lies.
            digest: SHA-256, `PreparedDataset.digest`.
            num_images: How many of its images.
            context: What for, "training", "validation" or "evaluation".
        """
        place = str(StoragePath.of(place))
        self._emit(self._event("input", name=name, place=place, digest=digest, num_images=num_images, context=context))

    def log_image(self, place: Place, key: str, step: int, time_ms: int) -> None:
        """Add a PNG to the series of pictures that MLflow shows by step, once. It must stay there as an artifact."""
        self._emit(self._event("image", time_ms, path=str(StoragePath.of(place)), image=key, step=step))

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Add a table of a run, of which MLflow shows those of one name side by side, once."""
        self._emit(self._event("table", table=name, rows=list(rows)))

    def log_model(self, checkpoint: Place, registered: str) -> None:
        """Log a checkpoint as an MLflow model of the run, and register it as the next version of a name.

        The checkpoint must stay where it is until MLflow has answered.
        """
        self._emit(self._event("model", path=str(StoragePath.of(checkpoint)), registered=registered))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._emit(self._event("finish", status=status), retry_now=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        killed = kind is not None and not issubclass(kind, Exception)
        self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _event(self, op: str, time_ms: int | None = None, **fields: Any) -> dict[str, Any]:
        return {"op": op, "key": self._key, "time_ms": time_ms or int(time.time() * 1000), **fields}

    def _emit(self, *events: dict[str, Any], retry_now: bool = False) -> None:
        """Send what waits, then these, up to the first that the server does not take; that and the rest wait."""
        before = _read(self._spool)
        waiting = [*_events(before or "", self._spool), *events]
        num_sent = self._server.send(waiting, self._spool) if retry_now or self._server.worth_trying() else 0
        after = "".join(json.dumps(event) + "\n" for event in waiting[num_sent:])
        if not after and events[-1]["op"] == "finish":
            self._spool.delete()
        elif after != before:
            self._spool.publish(after.encode())


def how_to_open(config: TrackingConfig) -> str:
    """Return what to type, or which page to open, to see the runs."""
    uri = resolve_uri(config)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def _run_key(spool: StoragePath, resume: bool) -> str:
    """Key of the run. It lives in the run directory: a fresh directory of the same name is a new run."""
    new = uuid.uuid4().hex
    if not resume:
        return new
    place = spool.parent / f"{spool.name.partition('.')[0]}.key"
    if (there := _read(place)) is None:
        place.publish(new.encode())
    return there or new


def _read(place: StoragePath) -> str | None:
    """The text of a file; None if there is none."""
    try:
        return place.read_bytes().decode()
    except FileNotFoundError:
        return None


def _events(text: str, spool: StoragePath) -> list[dict[str, Any]]:
    events = []
    for line in text.splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:  # an earlier version appended to the file, and could be killed doing so
            log.warning("%s: a torn line was left out: %.80s", spool, line)
    return events
