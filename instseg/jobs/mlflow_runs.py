"""Runs that MLflow recorded: found by id, by name or by a filter, and their files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from instseg.config import TrackingConfig
from instseg.jobs.cluster import JobError
from instseg.jobs.mlflow_server import quiet, resolve_uri

_ID = re.compile(r"[0-9a-f]{32}")
_FILTER = re.compile(r"[=<>]|\b(I?LIKE|IN)\b", re.IGNORECASE)  # of MLflow's search; names of runs have none of them


class Run(NamedTuple):
    """A run that has no runs within it.

    Attributes:
        run_id: MLflow's.
        name: Not unique; after that of the run that it was found in.
    """

    run_id: str
    name: str


def find_runs(text: str, tracking: TrackingConfig) -> list[Run]:
    """The runs of an id, a name, or a filter; of a run with runs in it, these, `full` first. Oldest first.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a name is that of several, or a filter is none.
        JobError: If MLflow cannot be reached.
    """
    with _client(tracking) as (client, experiments):
        if _ID.fullmatch(text):
            found = [client.get_run(text)]
        else:
            query = text if _FILTER.search(text) else f"attributes.run_name = '{text}'"
            found = client.search_runs(experiments, query, order_by=["attributes.start_time ASC"])
            if query is not text and len(found) > 1:
                ids = ", ".join(run.info.run_id for run in found)
                raise ValueError(f"{text}: expected the name of one run, got that of {len(found)}; choose of {ids}")
        if not found:
            raise FileNotFoundError(
                f"{text}: there is no such folder, and no such run of experiment {tracking.experiment!r} in MLflow at "
                f"{resolve_uri(tracking)}"
            )
        runs = [run for one in found for run in _within(client, experiments, one)]
        return list({run.run_id: run for run in runs}.values())


@contextmanager
def fetched(run: Run, files: Sequence[str], tracking: TrackingConfig) -> Iterator[Path]:
    """A folder with these artifacts of a run, for the time of the context.

    Raises:
        FileNotFoundError: If the run has not all of them; names it.
        JobError: If MLflow cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _client(tracking) as (client, _):
            there = {file.path for file in client.list_artifacts(run.run_id)}
            lacking = [file for file in files if file not in there]
            if lacking:
                raise FileNotFoundError(
                    f"run {run.name} ({run.run_id}): has no {lacking[0]}, which evaluate, ablate and crossvalidate "
                    "log; the filter tags.workflow = 'evaluate' finds such runs"
                )
            for file in files:
                client.download_artifacts(run.run_id, file, folder)
        yield Path(folder)


@contextmanager
def _client(tracking: TrackingConfig) -> Iterator[tuple[Any, list[str]]]:
    """MLflow, and the id of the experiment; its errors in one line."""
    uri = resolve_uri(tracking)
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():  # which MLflow would make
        raise FileNotFoundError(f"there is no such folder, and no MLflow database {database}; --tracking.uri names it")
    with quiet():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(tracking.experiment)
            yield client, [experiment.experiment_id] if experiment else []
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            known = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
            raise (ValueError if known else JobError)(f"MLflow at {uri}: {reason}") from error


def _within(client: Any, experiments: list[str], run: Any) -> list[Run]:
    """The runs nested in a run, or itself if there are none."""
    query, name = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", run.info.run_name
    rows = client.search_runs(experiments, query, order_by=["attributes.start_time ASC"])
    rows = sorted(rows, key=lambda row: row.info.run_name != "full")
    return [Run(row.info.run_id, f"{name}/{row.info.run_name}") for row in rows] or [Run(run.info.run_id, name)]
