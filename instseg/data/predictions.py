"""A shard of predictions: its inputs, the PNGs of its images, and what COCO's JSON will say of them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instseg.data.coco_results import SCHEMA, panoptic_pixels, part_row, read_part
from instseg.data.files import digest, read_json, sha256_of, write_json
from instseg.data.images import decode_photograph
from instseg.data.manifest import differing, digest_files
from instseg.data.quarantine import CorruptItemError, blame
from instseg.data.schema import decode_prediction, encode_png
from instseg.data.shards import ShardPlan, ShardReport, ShardTask, encode_rows, find_shard, publish_shard
from instseg.data.stages import Draft, read_items
from instseg.data.voc import voc_palette
from instseg.storage import StorageError, StoragePath
from instseg.structures import InstanceMap

SETTINGS, SUMMARY, SHARDS = "settings.json", "summary.json", "shards"
NUMBER, NAME = "number", "name"  # in an item's record: what COCO's JSON calls its image
FOLDERS = ("instances", "semantic", "overlay", "panoptic")
Draw = Callable[[np.ndarray, InstanceMap], bytes]


@dataclass(frozen=True)
class PredictionPlan:
    """What the tasks of one output folder have in common.

    Attributes:
        out: The output folder.
        shards: Of its folder `SHARDS`.
        prepared: Whether the items are rows of a data directory, and no files.
        panoptic: Whether COCO's panoptic format is written too.
        overlays: Whether instances are drawn over their images.
    """

    out: StoragePath
    shards: ShardPlan
    prepared: bool
    panoptic: bool
    overlays: bool

    def of(self, draft: Draft) -> ShardPlan:
        """The plan of its shard, whose digest has the content of its inputs too."""
        return replace(self.shards, digest=draft.digest)


def claim(out: StoragePath, settings: dict[str, Any]) -> None:
    """Record what the folder is going to hold.

    Raises:
        ValueError: If it holds predictions of other settings, or something else.
    """
    if (out / SETTINGS).size() is None:
        there = [*out.files(), *out.folders()]
        if there:
            raise ValueError(f"out {out}: expected a new or empty folder, or one of predictions, got {there[:3]} in it")
        write_json(out / SETTINGS, settings)
        return
    others = differing(read_json(out / SETTINGS), settings)
    if others:
        raise ValueError(f"out {out}: holds predictions of other settings: {others}; choose another --out")


def clear(plan: PredictionPlan) -> None:
    """Delete the summary, which is written last, and what killed workers were writing."""
    (plan.out / SUMMARY).delete()
    for folder in (plan.out, *(plan.out / name for name in (SHARDS, *FOLDERS))):
        if folder.local is not None and folder.local.is_dir():
            with os.scandir(folder.local) as entries:  # as they come: there may be millions
                for entry in entries:
                    if ".tmp-" in entry.name:
                        Path(entry).unlink(missing_ok=True)


def read_inputs(plan: PredictionPlan, task: ShardTask) -> Draft:
    """The images of a shard and what other systems made of them; nothing if its predictions are there already."""
    start = time.perf_counter()
    draft = Draft(task, digest=_digest_inputs(plan, task))
    draft.report = _find(plan, draft)
    if not draft.kept:
        (_read_rows if plan.prepared else read_items)(plan.shards, draft)
    draft.seconds["read"] = time.perf_counter() - start
    return draft


def _digest_inputs(plan: PredictionPlan, task: ShardTask) -> str:
    """Here and not of all images at the beginning, which of a million would take hours before the first one."""
    files = [file for item, _ in task.items for file in plan.shards.source.files(item)]
    if plan.shards.logits is not None:
        files += [plan.shards.logits / f"{item.image_id}.npz" for item, _ in task.items]
    return digest([plan.shards.digest, task.images, digest_files(dict.fromkeys(files))])


def _find(plan: PredictionPlan, draft: Draft) -> ShardReport | None:
    """The report of the shard, if it and the PNGs of its images are there and undamaged."""
    report = find_shard(plan.of(draft), draft.task)
    try:
        for row in [] if report is None else read_part(plan.shards.out / draft.task.file, "files"):
            if any(sha256_of(plan.out / file["name"]) != file["sha256"] for file in row):
                return None
    except StorageError:
        raise
    except (OSError, pa.ArrowException):
        return None
    return report


def _read_rows(plan: ShardPlan, draft: Draft) -> None:
    """Fill a draft with rows that prepare wrote, without their ground truth."""
    truth = {"semantic": None, "instances": None, "instance_labels": []}
    items = [item for item, _ in draft.task.items]
    file, expected = items[0].record["file_name"], items[0].record["sha256"]
    content = b""
    for item in items:
        try:
            with blame(item.image_id, file):
                content = content or _read_verified(plan.source.files(item)[0], expected)
                with pq.ParquetFile(pa.BufferReader(content)) as shard:
                    draft.rows.append(shard.read_row_group(item.record["row"]).to_pylist()[0] | truth)
        except CorruptItemError as error:
            draft.quarantined.append(error.row)


def _read_verified(file: StoragePath, expected: str) -> bytes:
    got = sha256_of(file)
    if got != expected:
        raise ValueError(f"damaged shard: expected SHA-256 {expected}, got {got}; run workflows/prepare.py again")
    return file.read_bytes()


def write_predictions(plan: PredictionPlan, draft: Draft, draw: Draw) -> ShardReport:
    """The PNGs of a draft's images, then its shard and report, unless they are there.

    Args:
        plan: Where to, and what.
        draft: After `predict`.
        draw: The overlay of an (H, W, 3) uint8 RGB image, as a PNG.

    Raises:
        OSError: If they cannot be written.
    """
    start = time.perf_counter()
    report = draft.report
    if report is None:
        records = {item.image_id: item.record for item, _ in draft.task.items}
        parts = [_write_image(plan, row, records[row["image_id"]], draw) for row in draft.rows]
        for image_id in records.keys() - {row["image_id"] for row in draft.rows}:  # of an earlier run, perhaps
            for folder in FOLDERS:
                (plan.out / folder / f"{image_id}.png").delete()
        content = encode_rows(parts, SCHEMA)
        report = publish_shard(plan.of(draft), draft.task, content, draft.rows, draft.quarantined, draft.notes)
    draft.seconds["write"] = time.perf_counter() - start
    return report


def _write_image(plan: PredictionPlan, row: dict[str, Any], record: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """Write an image's PNGs; its row of the shard."""
    found = decode_prediction(row)
    assert found.semantic is not None  # for type checkers
    name = f"{row['image_id']}.png"
    pictures = {
        "instances": encode_png(found.instances.astype(np.uint16)),
        "semantic": encode_png(found.semantic, voc_palette()),
    }
    if plan.panoptic:
        pictures["panoptic"] = encode_png(panoptic_pixels(found))
    if plan.overlays:
        pictures["overlay"] = draw(decode_photograph(row["image"]).pixels, found)
    files = []
    for folder, content in pictures.items():
        (plan.out / folder / name).publish(content)
        files.append({"name": f"{folder}/{name}", "sha256": hashlib.sha256(content).hexdigest()})
    return part_row(row, record[NUMBER], record[NAME], found, plan.panoptic) | {"files": files}
