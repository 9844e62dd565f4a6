from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from instseg.data.files import write_json
from instseg.data.network_outputs import read_detections
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardPlan, ShardReport, make_shard
from instseg.data.voc import open_devkit, read_lines


@pytest.fixture
def plan(devkit: Path, tmp_path: Path) -> ShardPlan:
    """Four images in two shards of a new folder."""
    reader = open_devkit(str(devkit))
    ids = reader.image_ids("train")
    (tmp_path / "prepared").mkdir()
    return ShardPlan(
        out=tmp_path / "prepared",
        devkit=reader,
        logits=str(devkit / "logits"),
        classes=("background", *read_lines(devkit / "classes.txt")),
        has_ground_truth=True,
        min_score=0.05,
        grabcut_iterations=1,
        shards=(tuple(ids[:3]), tuple(ids[3:])),
        detections=read_detections(str(devkit / "detections.json"))[0],
        digest="x",
    )


@pytest.fixture
def root(plan: ShardPlan) -> Path:
    """A data directory of two shards, made without Ray."""
    for index in range(2):
        make_shard(plan, index)
    shards = [asdict(ShardReport.read(plan.file(index))) for index in range(2)]
    manifest = {"classes": plan.classes, "shards": shards, "versions": {"format": FORMAT_VERSION}}
    write_json(plan.out / "manifest.json", manifest)
    return plan.out
