from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from instseg.data.files import write_json
from instseg.data.network_outputs import read_detections
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardPlan, ShardTask, make_shard
from instseg.data.voc import open_devkit, read_lines
from instseg.storage import StoragePath


@pytest.fixture
def plan(devkit: Path, tmp_path: Path) -> ShardPlan:
    """Of a data directory in a new folder."""
    return ShardPlan(
        out=StoragePath.of(tmp_path / "prepared"),
        devkit=open_devkit(devkit),
        logits=StoragePath.of(devkit / "logits"),
        classes=("background", *read_lines(devkit / "classes.txt")),
        has_ground_truth=True,
        min_score=0.05,
        grabcut_iterations=1,
        digest="x",
    )


@pytest.fixture
def tasks(plan: ShardPlan, devkit: Path) -> list[ShardTask]:
    """Four images in two shards."""
    ids, (records, _) = plan.devkit.image_ids("train"), read_detections(devkit / "detections.json")
    return [ShardTask.of(index, share, records) for index, share in enumerate((ids[:3], ids[3:]))]


@pytest.fixture
def root(plan: ShardPlan, tasks: list[ShardTask]) -> Path:
    """A data directory of two shards, made without Ray."""
    shards = [asdict(make_shard(plan, task)[0]) for task in tasks]
    manifest = {"classes": plan.classes, "shards": shards, "versions": {"format": FORMAT_VERSION}}
    write_json(plan.out / "manifest.json", manifest)
    return Path(plan.out.key)
