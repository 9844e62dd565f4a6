from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from instseg.config import GrabCutConfig
from instseg.data.files import write_json
from instseg.data.network_outputs import read_detections
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardPlan, ShardReport, ShardTask
from instseg.data.source import read_lines
from instseg.data.stages import foreground, read, write
from instseg.data.voc import open_devkit
from instseg.storage import StoragePath

NAMES = ("background", "a", "b", "c", "d", "e")  # as many as the generated devkit has


def make_shard(plan: ShardPlan, task: ShardTask) -> tuple[ShardReport, bool]:
    """All stages without networks, and whether the shard was there already."""
    draft = read(plan, task)
    return write(plan, foreground(plan, draft)), draft.kept


@pytest.fixture
def plan(devkit: Path, tmp_path: Path) -> ShardPlan:
    """Of a data directory in a new folder."""
    return ShardPlan(
        out=StoragePath.of(tmp_path / "prepared"),
        source=open_devkit(devkit, ("background", *read_lines(devkit / "classes.txt"))),
        logits=StoragePath.of(devkit / "logits"),
        min_score=0.05,
        grabcut=GrabCutConfig(),
        digest="x",
    )


@pytest.fixture
def tasks(plan: ShardPlan, devkit: Path) -> list[ShardTask]:
    """Four images in two shards."""
    items, (records, _) = open_devkit(devkit).list_split("train").items, read_detections(devkit / "detections.json")
    return [ShardTask.of(index, share, records) for index, share in enumerate((items[:3], items[3:]))]


@pytest.fixture
def root(plan: ShardPlan, tasks: list[ShardTask]) -> Path:
    """A data directory of two shards, made without Ray."""
    shards = [asdict(make_shard(plan, task)[0]) for task in tasks]
    manifest = {"classes": plan.source.classes, "shards": shards, "versions": {"format": FORMAT_VERSION}}
    write_json(plan.out / "manifest.json", manifest)
    return Path(plan.out.key)
