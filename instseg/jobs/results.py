"""Results by what a person calls them: folders that evaluate, ablate or crossvalidate wrote, or MLflow runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Any

from instseg.config import TrackingConfig
from instseg.evaluation.records import RECORDS, read_records
from instseg.jobs.mlflow_runs import fetched, find_runs
from instseg.report.comparison import Result
from instseg.report.results import RESULTS
from instseg.storage import StoragePath

ABLATION = "ablation.json"
_ID = re.compile(r"@[0-9a-f]{8}$")  # the beginning of a run's, after its name
_PARTS = ("metrics", "config", "per_class")


def find_results(names: Sequence[str], tracking: TrackingConfig) -> list[Result]:
    """The results that `names` stand for, in that order; an ablation stands for its rows, of which `full` is first.

    Raises:
        FileNotFoundError: If there is no such folder and no such run, or one without results.
        ValueError: If a name stands for several runs, or what is found is damaged or of another format.
        JobError: If MLflow cannot be reached.
    """
    results: list[Result] = []
    for name in names:
        folder = StoragePath.of(name)
        results += _of_folder(name, folder) if folder.is_folder() else _of_runs(name, tracking)
    return _named_apart(results)


def _of_folder(name: str, folder: StoragePath) -> list[Result]:
    files = folder.files()
    if RESULTS in files:
        return [read_result(name, folder)]
    if ABLATION not in files:
        hint = "evaluate it first, with --checkpoint" if "checkpoints" in folder.folders() else "evaluate writes them"
        raise FileNotFoundError(f"{folder}: has no {RESULTS} and no {ABLATION}; {hint}: workflows/evaluate.py")
    rows = [row for row in folder.folders() if (folder / row / RESULTS).size() is not None]
    return [read_result(f"{name.rstrip('/')}/{row}", folder / row) for row in _full_first(rows)]


def _of_runs(name: str, tracking: TrackingConfig) -> list[Result]:
    results = []
    for run in find_runs(name, tracking):
        with fetched(run, (RESULTS, RECORDS), tracking) as folder:
            results.append(read_result(f"{run.name}@{run.run_id[:8]}", StoragePath.of(folder)))
    return results


def _full_first(rows: Sequence[str]) -> list[str]:
    return sorted(rows, key=lambda row: row != "full")


def read_result(name: str, folder: StoragePath) -> Result:
    """The result in a folder. Raises as `find_results`."""
    place = folder / RESULTS
    content = _read_json(place)
    lacking = [part for part in _PARTS if part not in content]
    if lacking:
        raise ValueError(f"{place}: has no {lacking[0]!r}; written by another version, or not by evaluate?")
    return Result(name, content, tuple(sorted(read_records(folder / RECORDS), key=lambda record: record.image_id)))


def _read_json(place: StoragePath) -> dict[str, Any]:
    try:
        content = json.loads(place.read_bytes())
    except ValueError as error:
        raise ValueError(f"{place}: damaged ({error}); evaluate again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected an object, got {type(content).__name__}; evaluate again")
    return content


def _named_apart(results: Sequence[Result]) -> list[Result]:
    """Names without the folders that all have in common, and without what tells runs apart where it need not.

    Raises:
        ValueError: If two are the same.
    """
    parts = [PurePosixPath(result.name).parts for result in results]
    folders = zip(*(part[:-1] for part in parts), strict=False)
    num_common = len(list(takewhile(lambda names: len(set(names)) == 1, folders)))
    names = ["/".join(part[num_common:]) for part in parts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"results: expected each once, got {twice[0]} twice")
    short = [_ID.sub("", name) for name in names]
    names = short if len(set(short)) == len(short) else names
    return [replace(result, name=name) for name, result in zip(names, results, strict=True)]
