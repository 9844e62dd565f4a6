"""One shard of a data directory: what must be written, written at once, recognised when it is already there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instseg.data.files import read_json, sha256_of, write_json
from instseg.data.foreground import compute_foregrounds
from instseg.data.network_outputs import DetectionRecord, import_detections, parse_json, read_logits
from instseg.data.quarantine import CorruptItemError, QuarantineRow, blame
from instseg.data.schema import SCHEMA, encode_row
from instseg.data.voc import VocDevkit
from instseg.storage import StorageError, StoragePath
from instseg.structures import Sample

# A row group is one row of encoded bytes, each different: dictionaries and statistics would be copies of them, and
# statistics have no checksum.
_PARQUET = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False, "write_statistics": False}


@dataclass(frozen=True)
class ShardPlan:
    """What the tasks of one data directory have in common."""

    out: StoragePath
    devkit: VocDevkit
    logits: StoragePath | None
    classes: tuple[str, ...]  # [0] is background
    has_ground_truth: bool
    min_score: float
    grabcut_iterations: int
    digest: str  # of all that the bytes depend on


@dataclass(frozen=True)
class ShardTask:
    """What one task writes: a shard's number, its images, and their detections.

    Attributes:
        index: From 0.
        image_ids: One or more.
        detections: JSON, {image id: [[file, entry], ...]}, because an entry is whatever the results file has there.
    """

    index: int
    image_ids: list[str]
    detections: str

    @staticmethod
    def of(index: int, image_ids: list[str], records: dict[str, list[DetectionRecord]]) -> ShardTask:
        """The task that has its images' share of all `records`."""
        share = {i: [[record.file, record.entry] for record in records[i]] for i in image_ids if i in records}
        return ShardTask(index, image_ids, json.dumps(share))

    @property
    def records(self) -> dict[str, list[DetectionRecord]]:
        """The detections, by image."""
        return {i: [DetectionRecord(*record) for record in share] for i, share in parse_json(self.detections).items()}

    @property
    def file(self) -> str:
        """The shard's name."""
        return f"shard-{self.index:05d}.parquet"

    @property
    def report(self) -> str:
        """The name of what says that the shard is complete."""
        return f"shard-{self.index:05d}.json"


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds; written beside it, so that an interrupted run can go on from its complete shards.

    Attributes:
        file: Its name.
        num_bytes: Its size.
        sha256: Of its bytes.
        image_ids: One for each row.
        num_detections: In all rows.
        num_box_foregrounds: Detections whose foreground is their box.
        quarantined: The bad items of its images.
        digest: `ShardPlan.digest` of the run that wrote it.
    """

    file: str
    num_bytes: int
    sha256: str
    image_ids: list[str]
    num_detections: int
    num_box_foregrounds: int
    quarantined: list[QuarantineRow]
    digest: str

    @staticmethod
    def of_json(fields: dict[str, Any]) -> ShardReport:
        """The report that `asdict` and JSON made `fields` of. Raises TypeError or KeyError if they are others."""
        fields = {**fields, "quarantined": [QuarantineRow(**row) for row in fields["quarantined"]]}
        return ShardReport(**fields)


def make_shard(plan: ShardPlan, task: ShardTask) -> tuple[ShardReport, bool]:
    """Write a shard and then its report, unless both are there, undamaged and of the same plan.

    Returns:
        The report, and whether it was there already.

    Raises:
        OSError: If it cannot be written, or the inputs' store cannot be reached.
    """
    if (report := _find(plan, task)) is not None:
        return report, True
    report = _write(plan, task)
    write_json(plan.out / task.report, asdict(report))
    return report, False


def _find(plan: ShardPlan, task: ShardTask) -> ShardReport | None:
    """The report of the shard, if it is what this plan would write."""
    try:
        report = ShardReport.of_json(read_json(plan.out / task.report))
        return report if report.digest == plan.digest and report.sha256 == sha256_of(plan.out / task.file) else None
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(plan: ShardPlan, task: ShardTask) -> ShardReport:
    records, quarantined = task.records, []
    image_ids, num_detections, num_box = [], 0, 0
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA, **_PARQUET) as writer:
        for image_id in task.image_ids:
            try:
                row, bad = _prepare_image(plan, image_id, records.get(image_id, []))
            except CorruptItemError as error:
                quarantined.append(error.row)
                continue
            quarantined += bad
            image_ids.append(image_id)
            num_detections += len(row["detections"])
            num_box += sum(entry["foreground_source"] == "box" for entry in row["detections"])
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))  # one row group
    content = sink.getvalue().to_pybytes()
    (plan.out / task.file).publish(content)
    return ShardReport(
        file=task.file,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        image_ids=image_ids,
        num_detections=num_detections,
        num_box_foregrounds=num_box,
        quarantined=quarantined,
        digest=plan.digest,
    )


def _prepare_image(
    plan: ShardPlan, image_id: str, records: list[DetectionRecord]
) -> tuple[dict[str, Any], list[QuarantineRow]]:
    """The Parquet row of an image, and its bad detections."""
    image_path, _, _ = plan.devkit.files(image_id)
    with blame(image_id, plan.devkit.name(image_path)):
        image_file, image = plan.devkit.read_image(image_id)
        size, num_labels = image.shape[:2], len(plan.classes)
        truth = plan.devkit.read_masks(image_id, size, num_labels) if plan.has_ground_truth else None
        logits = None if plan.logits is None else read_logits(plan.logits, image_id, num_labels)
        detections, bad = import_detections(image_id, records, size, num_labels, plan.min_score)
        detections, sources = compute_foregrounds(image, detections, image_id, plan.grabcut_iterations)
        sample = Sample(image_id, image, detections, *(truth or ()), logits=logits)
        return encode_row(sample, image_file, sources, source="voc"), bad
