from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from instseg.data.foreground import compute_foregrounds
from instseg.data.images import ImageFile, decode_photograph
from instseg.data.network_outputs import DetectionRecord
from instseg.data.quarantine import LeftOut, QuarantineRow, count_by_kind
from instseg.data.schema import decode_row
from instseg.data.shards import ShardPlan, ShardTask
from instseg.data.source import Item, Truth
from instseg.data.stages import Draft, detect, foreground, read, segment, write
from instseg.data.voc import VocDevkit
from instseg.structures import Detections
from tests.data.conftest import make_shard


@pytest.fixture
def task(tasks: list[ShardTask]) -> ShardTask:
    return tasks[0]


def encoded(draft: Draft) -> Draft:
    return Draft.decode(draft.encode())


def found_at(x: int) -> Detections:
    return Detections(np.array([2]), np.array([0.8], np.float32), np.array([[x, 4, x + 20, 30]], np.float32))


def test_a_draft_is_the_same_in_another_process(plan: ShardPlan, task: ShardTask) -> None:
    draft = read(plan, task)
    draft.quarantined, draft.notes = [QuarantineRow("a", "b", "\ud800")], Counter(odd=2)
    assert encoded(draft) == draft
    again = foreground(plan, draft)
    assert encoded(again) == again
    write(plan, again)
    kept = read(plan, task)
    assert kept.kept
    assert not kept.rows
    assert encoded(kept) == kept


def test_a_shard_through_other_processes_has_the_same_bytes(plan: ShardPlan, task: ShardTask, tmp_path: Path) -> None:
    elsewhere = replace(plan, out=plan.out / "elsewhere")
    report = write(elsewhere, encoded(foreground(elsewhere, encoded(read(elsewhere, task)))))
    assert report == make_shard(plan, task)[0]


def test_networks_fill_in_what_other_systems_did_not(plan: ShardPlan, task: ShardTask) -> None:
    draft = read(replace(plan, logits=None), replace(task, images=ShardTask.of(0, items_of(task), {}).images))
    assert all(row["detections"] == [] and row["semantic_logits"] is None for row in draft.rows)
    draft = encoded(detect(draft, lambda image: found_at(int(image[0, 0, 0]) % 50)))
    draft = encoded(segment(draft, lambda image: np.full((6, 3, 4), image[1, 1, 1], np.float32)))
    report = write(plan, encoded(foreground(plan, draft)))
    assert (report.num_detections, report.quarantined) == (3, [])
    with (plan.out / report.file).open() as file:
        samples = [decode_row(row) for row in pq.read_table(file).to_pylist()]
    for sample in samples:
        x = int(sample.image[0, 0, 0]) % 50
        np.testing.assert_array_equal(sample.detections.boxes, [[x, 4, x + 20, 30]])
        expected, _ = compute_foregrounds(sample.image, found_at(x), sample.image_id, plan.grabcut)
        np.testing.assert_array_equal(sample.detections.foregrounds, expected.foregrounds)
        np.testing.assert_array_equal(sample.logits, np.full((6, 3, 4), sample.image[1, 1, 1]))


def test_an_image_that_a_network_fails_on_is_one_row(plan: ShardPlan, task: ShardTask) -> None:
    draft = read(plan, task)
    calls = iter(range(3))

    def fail_once(image: np.ndarray) -> Detections:
        if next(calls) == 1:
            raise RuntimeError("out of\nmemory")
        return found_at(3)

    ids = [row["image_id"] for row in draft.rows]
    detect(draft, fail_once)
    assert [row["image_id"] for row in draft.rows] == [ids[0], ids[2]]
    assert [str(row) for row in draft.quarantined] == [f"{ids[1]}: stage detect: RuntimeError: out of memory"]


class Odd(VocDevkit):
    """A source of one image that is rotated, and one that is left out by its rule."""

    def read_image(self, item: Item) -> ImageFile:
        picture = super().read_image(item)
        if not item.image_id.endswith("0"):
            return picture
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 3
        Image.fromarray(picture.pixels).save(buffer, "PNG", exif=exif)
        return decode_photograph(buffer.getvalue())

    def read_truth(self, item: Item, size: tuple[int, int]) -> Truth | None:
        if item.image_id.endswith("1"):
            raise LeftOut("fewer than 9 pixels of the classes")
        return None


def test_what_was_done_to_images_is_counted(plan: ShardPlan, task: ShardTask) -> None:
    assert isinstance(plan.source, VocDevkit)
    odd = replace(plan, source=Odd(plan.source.root, plan.source.classes), logits=None)
    nothing = ShardTask.of(0, items_of(task), {})
    report = make_shard(odd, nothing)[0]
    assert report.notes == {
        "left out: fewer than 9 pixels of the classes": 1,
        "rotated as its EXIF orientation says": 1,
    }
    assert report.image_ids == ["scene_00000", "scene_00002"]
    assert report.quarantined == []
    with (odd.out / report.file).open() as file:
        rotated = decode_row(pq.read_table(file).to_pylist()[0]).image
    assert isinstance(plan.source, VocDevkit)
    upright = plan.source.read_image(Item("scene_00000", "voc")).pixels
    np.testing.assert_array_equal(rotated, upright[::-1, ::-1])


def test_boxes_of_a_rotated_image_are_refused(plan: ShardPlan, task: ShardTask) -> None:
    """Nobody knows whether they are of the file's pixels or of the upright image."""
    assert isinstance(plan.source, VocDevkit)
    odd = replace(plan, source=Odd(plan.source.root, plan.source.classes), logits=None, digest="z")
    entry = {"category_id": 1, "score": 0.5, "bbox": [1, 1, 20, 20]}
    boxed = ShardTask.of(0, items_of(task), {"scene_00000": [DetectionRecord("d.json[0]", entry)]})
    report = make_shard(odd, boxed)[0]
    (row,) = report.quarantined
    assert (row.image_id, row.reason.split(":")[0]) == ("scene_00000", "has an EXIF orientation")


def items_of(task: ShardTask) -> list[Item]:
    return [item for item, _ in task.items]


def test_reasons_are_counted_by_kind() -> None:
    reasons = [
        "damaged image: truncated at 7",
        "damaged image: odd",
        "file is missing",
        "expected the image's 96x64 pixels, got 95x64",
        "expected the image's 96x64 pixels, got 95x65",
        "expected the image's 500x375 pixels, got 1x1",
    ]
    assert count_by_kind([QuarantineRow("a", "b", reason) for reason in reasons]) == {
        "expected the image's": 3,
        "damaged image": 2,
        "file is missing": 1,
    }
