"""One shard of a data directory: what must be written, written atomically, recognised when it is already there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instseg.data.files import published, read_json, sha256_of, write_json
from instseg.data.foreground import compute_foregrounds
from instseg.data.network_outputs import DetectionRecord, import_detections, read_logits
from instseg.data.quarantine import CorruptItemError, QuarantineRow, blame
from instseg.data.schema import SCHEMA, encode_row
from instseg.data.voc import VocDevkit
from instseg.structures import Sample

# A row group is one row of encoded bytes, each different: dictionaries and statistics would be copies of them, and
# statistics have no checksum.
_PARQUET = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False, "write_statistics": False}


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
    def read(path: Path) -> ShardReport:
        """The report of the shard at `path`.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged.
        """
        fields = read_json(path.with_suffix(".json"))
        fields["quarantined"] = [QuarantineRow(**row) for row in fields["quarantined"]]
        return ShardReport(**fields)

    def write(self, path: Path) -> None:
        """Write it beside the shard at `path`."""
        write_json(path.with_suffix(".json"), asdict(self))


def make_shard(plan: ShardPlan, index: int) -> bool:
    """Write shard `index` and its report, unless both are there, undamaged and of the same plan.

    Returns:
        Whether it was there already.

    Raises:
        OSError: If it cannot be written.
    """
    path = plan.file(index)
    if _is_there(path, plan.digest):
        return True
    _write(plan, index).write(path)
    return False


def _is_there(path: Path, digest: str) -> bool:
    try:
        report = ShardReport.read(path)
        return report.digest == digest and report.sha256 == sha256_of(path)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _write(plan: ShardPlan, index: int) -> ShardReport:
    path, quarantined = plan.file(index), []
    image_ids, num_detections, num_box = [], 0, 0
    with (
        published(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, **_PARQUET) as writer,
    ):
        for image_id in plan.shards[index]:
            try:
                row, bad = _prepare_image(plan, image_id)
            except CorruptItemError as error:
                quarantined.append(error.row)
                continue
            quarantined += bad
            image_ids.append(image_id)
            num_detections += len(row["detections"])
            num_box += sum(entry["foreground_source"] == "box" for entry in row["detections"])
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))  # one row group
    return ShardReport(
        file=path.name,
        num_bytes=path.stat().st_size,
        sha256=sha256_of(path),
        image_ids=image_ids,
        num_detections=num_detections,
        num_box_foregrounds=num_box,
        quarantined=quarantined,
        digest=plan.digest,
    )


def _prepare_image(plan: ShardPlan, image_id: str) -> tuple[dict[str, Any], list[QuarantineRow]]:
    """The Parquet row of an image, and its bad detections."""
    image_path, _, _ = plan.devkit.files(image_id)
    with blame(image_id, plan.devkit.name(image_path)):
        image_file, image = plan.devkit.read_image(image_id)
        size, num_labels = image.shape[:2], len(plan.classes)
        truth = plan.devkit.read_masks(image_id, size, num_labels) if plan.has_ground_truth else None
        logits = None if plan.logits is None else read_logits(plan.logits, image_id, num_labels)
        records = plan.detections.get(image_id, [])
        detections, bad = import_detections(image_id, records, size, num_labels, plan.min_score)
        detections, sources = compute_foregrounds(image, detections, image_id, plan.grabcut_iterations)
        sample = Sample(image_id, image, detections, *(truth or ()), logits=logits)
        return encode_row(sample, image_file, sources, source="voc"), bad
