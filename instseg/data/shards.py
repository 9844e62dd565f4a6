"""One shard of a data directory: what must be written, written atomically, recognised when it is already there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instseg.data.foreground import compute_foregrounds
from instseg.data.network_outputs import DetectionRecord, import_detections, read_logits
from instseg.data.quarantine import CorruptItemError, QuarantineRow
from instseg.data.schema import SCHEMA, encode_row
from instseg.data.voc import VocDevkit
from instseg.structures import Sample

_FOOTER_KEY = b"instseg"


@dataclass(frozen=True)
class ShardPlan:
    """All that a task needs to write any shard of one data directory."""

    out: Path
    devkit: VocDevkit
    logits: str | None
    classes: tuple[str, ...]  # [0] is background
    has_ground_truth: bool
    min_score: float
    grabcut_iterations: int
    shards: tuple[tuple[str, ...], ...]  # image ids
    detections: dict[str, list[DetectionRecord]]
    digest: str  # of all that the bytes depend on

    def file(self, index: int) -> Path:
        """Where a shard goes."""
        return self.out / f"shard-{index:05d}.parquet"


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds. `kept` tells that it was there already."""

    file: str
    num_rows: int
    sha256: str
    image_ids: list[str]
    num_detections: int
    num_box_foregrounds: int
    quarantined: list[QuarantineRow]
    kept: bool

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ShardReport:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return ShardReport(**fields | {"quarantined": [QuarantineRow(**row) for row in fields["quarantined"]]})


def make_shard(plan: ShardPlan, index: int) -> ShardReport:
    """Write shard `index` unless a complete one of the same plan is there."""
    footer = _read_footer(plan.file(index), plan.digest)
    if footer is not None:
        return _report(plan.file(index), footer, kept=True)
    return _report(plan.file(index), _write(plan, index), kept=False)


def _write(plan: ShardPlan, index: int) -> dict[str, Any]:
    path = plan.file(index)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    rows: list[QuarantineRow] = []
    image_ids, num_detections, num_box = [], 0, 0
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for image_id in plan.shards[index]:
            try:
                row, bad = _prepare_image(plan, image_id)
            except CorruptItemError as error:
                rows.append(error.row)
                continue
            rows += bad
            image_ids.append(image_id)
            num_detections += len(row["detections"])
            num_box += sum(entry["foreground_source"] == "box" for entry in row["detections"])
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))  # one row group
        footer = {
            "digest": plan.digest,
            "image_ids": image_ids,
            "num_detections": num_detections,
            "num_box_foregrounds": num_box,
            "quarantined": [asdict(row) for row in rows],
        }
        writer.add_key_value_metadata({_FOOTER_KEY: json.dumps(footer).encode()})
    temporary.replace(path)
    return footer


def _prepare_image(plan: ShardPlan, image_id: str) -> tuple[dict[str, Any], list[QuarantineRow]]:
    """The Parquet row of an image, and its bad detections."""
    image_file, image = plan.devkit.read_image(image_id)
    size, num_labels = image.shape[:2], len(plan.classes)
    truth = plan.devkit.read_masks(image_id, size, num_labels) if plan.has_ground_truth else None
    logits = None if plan.logits is None else read_logits(plan.logits, image_id, num_labels)
    records = plan.detections.get(image_id, [])
    detections, bad = import_detections(image_id, records, size, num_labels, plan.min_score)
    detections, sources = compute_foregrounds(image, detections, image_id, plan.grabcut_iterations)
    sample = Sample(image_id, image, detections, *(truth or ()), logits=logits)
    return encode_row(sample, image_file, sources, source="voc"), bad


def _read_footer(path: Path, digest: str) -> dict[str, Any] | None:
    """The footer of a complete shard with this digest, else None."""
    try:
        metadata = pq.read_metadata(path)
        footer = json.loads((metadata.metadata or {})[_FOOTER_KEY])
        complete = footer["digest"] == digest and metadata.num_rows == len(footer["image_ids"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError, TypeError):
        return None
    return footer if complete else None


def _report(path: Path, footer: dict[str, Any], kept: bool) -> ShardReport:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardReport(
        file=path.name,
        num_rows=len(footer["image_ids"]),
        sha256=sha256,
        image_ids=footer["image_ids"],
        num_detections=footer["num_detections"],
        num_box_foregrounds=footer["num_box_foregrounds"],
        quarantined=[QuarantineRow(**row) for row in footer["quarantined"]],
        kept=kept,
    )
