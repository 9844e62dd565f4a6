"""Records of a result as an Arrow file, so that it can be compared with others later; lossless, for any Arrow reader.

One row an image, IoUs row by row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.semantic import Confusion
from instseg.storage import Place, StoragePath

RECORDS = "records.arrow"
FORMAT_VERSION = 3  # raise it whenever a column changes
_VERSION, _DIGEST = b"instseg.records.version", b"instseg.records.sha256"
_INTEGERS, _FLOATS, _TRUTHS = (pa.list_(kind) for kind in (pa.int64(), pa.float64(), pa.bool_()))
_CONFUSION = pa.struct({"num_labels": pa.int64(), "places": _INTEGERS, "counts": _INTEGERS})  # as in Confusion: 1, E, E
_TYPES = {
    "image_id": pa.string(),
    "labels": _INTEGERS,  # P
    "scores": _FLOATS,  # P
    "iou": _FLOATS,  # P * G
    "truth_labels": _INTEGERS,  # G
    "confusion_before": _CONFUSION,
    "confusion_after": _CONFUSION,
    "pixels": _INTEGERS,  # P
    "void_pixels": _INTEGERS,  # P
    "truth_pixels": _INTEGERS,  # G
    "detection_labels": _INTEGERS,  # D
    "detection_scores": _FLOATS,  # D
    "validity": _FLOATS,  # D
    "matched": _TRUTHS,  # D
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _TYPES.items()])


def write_records(place: Place, records: Sequence[ImageRecord]) -> None:
    """Write the records of a result, in their order."""
    columns = [pa.array([_cell(getattr(record, name)) for record in records], kind) for name, kind in _TYPES.items()]
    schema = SCHEMA.with_metadata({_VERSION: str(FORMAT_VERSION), _DIGEST: _digest(columns)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    StoragePath.of(place).publish(sink.getvalue().to_pybytes())


def read_records(place: Place) -> list[ImageRecord]:
    """The records that `write_records` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, not such a file, or of another format.
    """
    path = StoragePath.of(place)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {RECORDS} lies beside a result's results.json") from None
    try:
        with pa.ipc.open_file(content) as reader:
            table = reader.read_all()
        table.validate(full=True)
        metadata = table.schema.metadata or {}
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, or not an Arrow file: {error}") from error
    version = metadata.get(_VERSION, b"none").decode(errors="replace")
    if version != str(FORMAT_VERSION) or not table.schema.equals(SCHEMA):
        raise ValueError(f"{path}: expected records of format {FORMAT_VERSION}, got {version}; evaluate again")
    columns = [column.combine_chunks() for column in table.columns]
    if metadata.get(_DIGEST) != _digest(columns):
        raise ValueError(f"{path}: damaged: its values are not those that were written; evaluate again")
    return [_record(*cells) for cells in zip(*map(_values, columns), strict=True)]


def _record(*cells: Any) -> ImageRecord:
    values = dict(zip(SCHEMA.names, cells, strict=True))
    values["iou"] = values["iou"].reshape(len(values["labels"]), len(values["truth_labels"]))
    return ImageRecord(**values)


def _cell(value: Any) -> Any:
    """A field of a record, as Arrow takes it."""
    if isinstance(value, Confusion):
        return value._asdict()
    return value.ravel() if isinstance(value, np.ndarray) else value


def _values(column: pa.Array) -> list[Any]:
    """The fields of all records that `_cell` made a column of; arrays are views of it."""
    if pa.types.is_struct(column.type):
        return [Confusion(*parts) for parts in zip(*map(_values, column.flatten()), strict=True)]
    if pa.types.is_list(column.type):
        values = column.values.to_numpy(zero_copy_only=False)
        return [values[begin:end] for begin, end in pairwise(column.offsets.to_numpy())]
    return column.to_pylist()


def _digest(columns: Sequence[pa.Array]) -> bytes:
    sha256 = hashlib.sha256()
    for column in columns:
        for part in _parts(column):
            sha256.update(part)
    return sha256.hexdigest().encode()


def _parts(column: pa.Array) -> Iterator[bytes]:
    """All that a column holds, whatever its memory looks like."""
    if pa.types.is_struct(column.type):
        for part in column.flatten():
            yield from _parts(part)
    elif pa.types.is_list(column.type):
        yield column.offsets.to_numpy().tobytes()
        yield column.values.to_numpy(zero_copy_only=False).tobytes()
    else:
        yield json.dumps(column.to_pylist()).encode()
