from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from instseg.data.foreground import compute_foregrounds
from instseg.data.shards import ShardPlan, ShardReport, make_shard


def _content(plan: ShardPlan) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in plan.out.iterdir()}


def test_a_shard_that_is_there_is_kept(plan: ShardPlan) -> None:
    assert not make_shard(plan, 0)
    time = plan.file(0).stat().st_mtime_ns
    assert make_shard(plan, 0)
    assert plan.file(0).stat().st_mtime_ns == time
    report = ShardReport.read(plan.file(0))
    assert report.image_ids == list(plan.shards[0])
    assert report.num_bytes == plan.file(0).stat().st_size


def test_a_damaged_shard_is_made_again(plan: ShardPlan) -> None:
    make_shard(plan, 0)
    before = _content(plan)
    for name, content in before.items():
        for place in range(0, len(content), max(len(content) // 7, 1)):
            (plan.out / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            assert not make_shard(plan, 0)
            assert _content(plan) == before
        (plan.out / name).unlink()
        assert not make_shard(plan, 0)
        assert _content(plan) == before


def test_a_shard_of_another_plan_is_made_again(plan: ShardPlan) -> None:
    make_shard(plan, 0)
    assert not make_shard(replace(plan, digest="y"), 0)
    assert not make_shard(plan, 0)


def test_whatever_an_image_raises_is_one_row(plan: ShardPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    second = plan.shards[0][1]

    def fail(image, detections, image_id, num_iterations):
        if image_id == second:
            raise cv2.error("odd\nerror")
        return compute_foregrounds(image, detections, image_id, num_iterations)

    monkeypatch.setattr("instseg.data.shards.compute_foregrounds", fail)
    make_shard(plan, 0)
    report = ShardReport.read(plan.file(0))
    assert report.image_ids == [image_id for image_id in plan.shards[0] if image_id != second]
    assert [str(row) for row in report.quarantined] == [f"{second}: JPEGImages/{second}.jpg: error: odd error"]


def test_a_full_disk_is_no_fault_of_an_image(plan: ShardPlan) -> None:
    path = plan.file(0)
    path.with_name(f"{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_shard(plan, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(plan.out))
    assert list(plan.out.iterdir()) == []


def test_a_bad_image_does_not_stop_its_shard(plan: ShardPlan, tmp_path: Path) -> None:
    logits = tmp_path / "logits"
    logits.mkdir()
    make_shard(replace(plan, logits=str(logits)), 0)
    report = ShardReport.read(plan.file(0))
    assert report.image_ids == []
    assert {row.reason for row in report.quarantined} == {"file is missing"}
