"""One shard of a data directory: what must be written, written at once, recognised when it is already there."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instseg.config import GrabCutConfig
from instseg.data.files import read_json, sha256_of, write_json
from instseg.data.network_outputs import DetectionRecord, parse_json
from instseg.data.quarantine import QuarantineRow
from instseg.data.schema import SCHEMA
from instseg.data.source import Item, Source
from instseg.storage import StorageError, StoragePath

# A row group is one row of encoded bytes, each different: dictionaries and statistics would be copies of them, and
# statistics have no checksum.
_PARQUET = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False, "write_statistics": False}


@dataclass(frozen=True)
class ShardPlan:
    """What the tasks of one data directory have in common.

    Attributes:
        out: The data directory.
        source: Reads the images and their ground truth.
        logits: Folder of another network's <image_id>.npz, if there is one.
        min_score: Detections below are left out.
        grabcut: For the foregrounds.
        digest: Of all that the bytes depend on.
    """

    out: StoragePath
    source: Source
    logits: StoragePath | None
    min_score: float
    grabcut: GrabCutConfig
    digest: str


@dataclass(frozen=True)
class ShardTask:
    """What one task writes: a shard's number and its images.

    Attributes:
        index: From 0.
        images: JSON, [[image id, source, record, [[file, entry of the detections], ...]], ...], because records and
            entries are whatever other systems' files have there.
    """

    index: int
    images: str

    @staticmethod
    def of(index: int, items: list[Item], records: Mapping[str, list[DetectionRecord]]) -> ShardTask:
        """The task that has its images' share of all `records`."""
        images = [
            [item.image_id, item.source, item.record, [[r.file, r.entry] for r in records.get(item.image_id, [])]]
            for item in items
        ]
        return ShardTask(index, json.dumps(images))

    @property
    def items(self) -> list[tuple[Item, list[DetectionRecord]]]:
        """The images, each with its detections."""
        return [
            (Item(image_id, source, record), [DetectionRecord(*each) for each in detections])
            for image_id, source, record, detections in parse_json(self.images)
        ]

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
        num_instances: True ones, in all rows.
        num_detections: In all rows.
        num_box_foregrounds: Detections whose foreground is their box.
        quarantined: The bad items of its images.
        notes: How many images were left out of the set by its rules, converted or rotated, by what was done.
        digest: `ShardPlan.digest` of the run that wrote it.
    """

    file: str
    num_bytes: int
    sha256: str
    image_ids: list[str]
    num_instances: int
    num_detections: int
    num_box_foregrounds: int
    quarantined: list[QuarantineRow]
    notes: dict[str, int]
    digest: str

    @staticmethod
    def of_json(fields: dict[str, Any]) -> ShardReport:
        """The report that `asdict` and JSON made `fields` of. Raises TypeError or KeyError if they are others."""
        fields = {**fields, "quarantined": [QuarantineRow(**row) for row in fields["quarantined"]]}
        return ShardReport(**fields)


def find_shard(plan: ShardPlan, task: ShardTask) -> ShardReport | None:
    """The report of the shard, if it is there, undamaged and what this plan would write.

    Raises:
        OSError: If the store cannot be reached.
    """
    try:
        report = ShardReport.of_json(read_json(plan.out / task.report))
        return report if report.digest == plan.digest and report.sha256 == sha256_of(plan.out / task.file) else None
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_shard(
    plan: ShardPlan, task: ShardTask, rows: list[dict[str, Any]], quarantined: list[QuarantineRow], notes: Counter[str]
) -> ShardReport:
    """Write a shard of these rows of `SCHEMA` and then its report.

    Raises:
        OSError: If it cannot be written.
    """
    return publish_shard(plan, task, encode_rows(rows, SCHEMA), rows, quarantined, notes)


def encode_rows(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """A Parquet file with a row group for each row."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **_PARQUET) as writer:
        for row in rows:
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    return sink.getvalue().to_pybytes()


def publish_shard(
    plan: ShardPlan,
    task: ShardTask,
    content: bytes,
    rows: list[dict[str, Any]],
    quarantined: list[QuarantineRow],
    notes: Counter[str],
) -> ShardReport:
    """Write the content of a shard, and then its report, which counts what these rows of `SCHEMA` have.

    Raises:
        OSError: If it cannot be written.
    """
    (plan.out / task.file).publish(content)
    report = ShardReport(
        file=task.file,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        image_ids=[row["image_id"] for row in rows],
        num_instances=sum(label > 0 for row in rows for label in row["instance_labels"]),
        num_detections=sum(len(row["detections"]) for row in rows),
        num_box_foregrounds=sum(e["foreground_source"] == "box" for row in rows for e in row["detections"]),
        quarantined=quarantined,
        notes=dict(sorted(notes.items())),
        digest=plan.digest,
    )
    write_json(plan.out / task.report, asdict(report))
    return report
