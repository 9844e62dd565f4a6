from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest

from instseg import storage
from instseg.data.foreground import compute_foregrounds
from instseg.data.network_outputs import DetectionRecord
from instseg.data.shards import ShardPlan, ShardTask
from instseg.data.source import Item
from instseg.storage import StorageError, StoragePath
from tests.data.conftest import make_shard
from tests.s3 import S3


@pytest.fixture
def out(plan: ShardPlan) -> Path:
    return Path(plan.out.key)


@pytest.fixture
def task(tasks: list[ShardTask]) -> ShardTask:
    return tasks[0]


def ids_of(task: ShardTask) -> list[str]:
    return [item.image_id for item, _ in task.items]


def _content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_shard_that_is_there_is_kept(plan: ShardPlan, task: ShardTask, out: Path) -> None:
    report, kept = make_shard(plan, task)
    assert not kept
    time = (out / task.file).stat().st_mtime_ns
    assert make_shard(plan, task) == (report, True)
    assert (out / task.file).stat().st_mtime_ns == time
    assert report.image_ids == ids_of(task)
    assert report.num_bytes == (out / task.file).stat().st_size


def test_a_damaged_shard_is_made_again(plan: ShardPlan, task: ShardTask, out: Path) -> None:
    make_shard(plan, task)
    before = _content(out)
    for name, content in before.items():
        for place in range(0, len(content), max(len(content) // 7, 1)):
            (out / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            assert not make_shard(plan, task)[1]
            assert _content(out) == before
        (out / name).unlink()
        assert not make_shard(plan, task)[1]
        assert _content(out) == before


def test_a_shard_of_another_plan_is_made_again(plan: ShardPlan, task: ShardTask) -> None:
    make_shard(plan, task)
    assert not make_shard(replace(plan, digest="y"), task)[1]
    assert not make_shard(plan, task)[1]


def test_an_object_store_gets_the_bytes_that_a_folder_gets(
    plan: ShardPlan, tasks: list[ShardTask], out: Path, s3: S3
) -> None:
    store = StoragePath.of(s3("shards"))
    for task in tasks:
        here, there = make_shard(plan, task), make_shard(replace(plan, out=store), task)
        assert here == there
        assert make_shard(replace(plan, out=store), task) == (there[0], True)
    assert {name: (store / name).read_bytes() for name in store.files()} == _content(out)


def test_a_task_has_its_own_images_detections_alone() -> None:
    """Whatever their entries are: strings that are no UTF-8, numbers beyond floats."""
    records = {name: [DetectionRecord(f"{name}[0]", {"x": value})] for name, value in (("a", "\ud800"), ("b", 10**500))}
    items = [Item("a", "voc"), Item("c", "coco", {"file_name": "c.jpg"})]
    assert ShardTask.of(0, items, records).items == [(items[0], records["a"]), (items[1], [])]
    infinite = {"a": [DetectionRecord("f", {"x": float("inf")})]}
    assert ShardTask.of(0, items, infinite).items[0][1][0].entry["x"] > 1e308


def test_whatever_an_image_raises_is_one_row(plan: ShardPlan, task: ShardTask, monkeypatch: pytest.MonkeyPatch) -> None:
    second = ids_of(task)[1]

    def fail(image, detections, image_id, config):
        if image_id == second:
            raise cv2.error("odd\nerror")
        return compute_foregrounds(image, detections, image_id, config)

    monkeypatch.setattr("instseg.data.stages.compute_foregrounds", fail)
    report, _ = make_shard(plan, task)
    assert report.image_ids == [image_id for image_id in ids_of(task) if image_id != second]
    assert [str(row) for row in report.quarantined] == [f"{second}: stage foreground: error: odd error"]


def test_a_store_that_is_down_is_no_fault_of_an_image(
    plan: ShardPlan, task: ShardTask, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = StoragePath.of("s3://bucket/logits?endpoint_override=127.0.0.1:9&scheme=http")
    monkeypatch.setattr(storage, "_ATTEMPTS", 1)
    with pytest.raises(StorageError, match="cannot be reached"):
        make_shard(replace(plan, logits=away), task)
    assert not out.exists()


def test_a_full_disk_is_no_fault_of_an_image(
    plan: ShardPlan, task: ShardTask, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.uuid, "uuid4", lambda: SimpleNamespace(hex="1"))
    out.mkdir()
    (out / f"{task.file}.tmp-1").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_shard(plan, task)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(out))
    assert list(out.iterdir()) == []


def test_a_bad_image_does_not_stop_its_shard(plan: ShardPlan, task: ShardTask, tmp_path: Path) -> None:
    report, _ = make_shard(replace(plan, logits=StoragePath.of(tmp_path / "absent")), task)
    assert report.image_ids == []
    assert {row.reason for row in report.quarantined} == {"file is missing"}
