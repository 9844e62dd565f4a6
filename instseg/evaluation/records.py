"""Records of a result as an Arrow file, so that it can be compared with others later; lossless, for any Arrow reader.

One row an image, matrices row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from instseg.evaluation.ap_r import ImageRecord

FORMAT_VERSION = 1  # raise it whenever a column changes
_VERSION, _DIGEST = b"instseg.records.version", b"instseg.records.sha256"
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.int64()), nullable=False),  # P
        pa.field("scores", pa.list_(pa.float64()), nullable=False),  # P
        pa.field("iou", pa.list_(pa.float64()), nullable=False),  # P * G
        pa.field("truth_labels", pa.list_(pa.int64()), nullable=False),  # G
        pa.field("confusion_before", pa.list_(pa.int64()), nullable=False),  # L * L
        pa.field("confusion_after", pa.list_(pa.int64()), nullable=False),  # L * L
        pa.field("detection_labels", pa.list_(pa.int64()), nullable=False),  # D
        pa.field("detection_scores", pa.list_(pa.float64()), nullable=False),  # D
        pa.field("validity", pa.list_(pa.float64()), nullable=False),  # D
        pa.field("matched", pa.list_(pa.bool_()), nullable=False),  # D
    ]
)
_ARRAYS = SCHEMA.names[1:]


def write_records(path: Path, records: Sequence[ImageRecord]) -> None:
    """Write the records of a result, in their order."""
    columns = [pa.array([record.image_id for record in records], pa.string())]
    columns += [pa.array([_flat(record, name) for record in records], SCHEMA.field(name).type) for name in _ARRAYS]
    schema = SCHEMA.with_metadata({_VERSION: str(FORMAT_VERSION), _DIGEST: _digest(records)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def read_records(path: Path) -> list[ImageRecord]:
    """The records that `write_records` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, not such a file, or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; records.arrow lies beside a result's results.json")
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            table = reader.read_all()
        table.validate(full=True)
        metadata = table.schema.metadata or {}
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, or not an Arrow file: {error}") from error
    version = metadata.get(_VERSION, b"none").decode(errors="replace")
    if version != str(FORMAT_VERSION) or not table.schema.equals(SCHEMA):
        raise ValueError(f"{path}: expected records of format {FORMAT_VERSION}, got {version}; evaluate again")
    try:
        records = [_record(table.slice(row, 1)) for row in range(len(table))]
    except ValueError:
        records = None
    if records is None or metadata.get(_DIGEST) != _digest(records):
        raise ValueError(f"{path}: damaged: its values are not those that were written; evaluate again")
    return records


def _record(row: pa.Table) -> ImageRecord:
    values = {name: row[name].chunk(0).flatten().to_numpy(zero_copy_only=False) for name in _ARRAYS}
    values["iou"] = values["iou"].reshape(len(values["labels"]), len(values["truth_labels"]))
    num_labels = round(len(values["confusion_after"]) ** 0.5)
    for name in ("confusion_before", "confusion_after"):
        values[name] = values[name].reshape(num_labels, num_labels)
    return ImageRecord(row["image_id"][0].as_py(), **values)


def _flat(record: ImageRecord, name: str) -> np.ndarray:
    return getattr(record, name).ravel().astype(SCHEMA.field(name).type.value_type.to_pandas_dtype())


def _digest(records: Sequence[ImageRecord]) -> bytes:
    sha256 = hashlib.sha256()
    for record in records:
        sha256.update(record.image_id.encode())
        for name in _ARRAYS:
            sha256.update(_flat(record, name).tobytes())
    return sha256.hexdigest().encode()
