"""Outputs of other systems: detections as COCO results JSON, semantic logits as <image_id>.npz."""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeGuard

import numpy as np

from instseg.data.quarantine import CorruptItemError, QuarantineRow, blame
from instseg.storage import Place, StoragePath
from instseg.structures import Detections

_MAX_LOGITS_BYTES = 1 << 30  # far above any network's output; a header may claim anything
_MAX_DIGITS = 400  # no float is longer; Python refuses to convert integers of several thousand digits


@dataclass(frozen=True)
class DetectionRecord:
    """One unchecked entry of a results file; `file` says where it stands, as in "detections.json[17]"."""

    file: str
    entry: dict[str, Any]


def read_detections(path: Place) -> tuple[dict[str, list[DetectionRecord]], list[QuarantineRow]]:
    """Read COCO results `[{image_id, category_id 1..K, bbox [x, y, w, h], score}, ...]`.

    Returns:
        The records of each image in file order, and the entries that belong to no image.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or not a list.
    """
    file = StoragePath.of(path)
    try:
        entries = parse_json(file.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"detections {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"detections {path}: not a JSON file: {error}") from None
    except RecursionError:
        raise ValueError(f"detections {path}: expected a list of objects, got JSON that is nested too deeply") from None
    if not isinstance(entries, list):
        expected = "a list of {image_id, category_id, bbox, score}"
        raise ValueError(f"detections {path}: expected {expected}, got {type(entries).__name__}")
    records: dict[str, list[DetectionRecord]] = {}
    rows = []
    for index, entry in enumerate(entries):
        name = f"{file.name}[{index}]"
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), str | int):
            records.setdefault(str(entry["image_id"]), []).append(DetectionRecord(name, entry))
        else:
            rows.append(QuarantineRow("", name, "expected an object with an image_id"))
    return records, rows


def parse_json(text: str | bytes) -> Any:
    """Any JSON, numbers of thousands of digits as infinity. Raises ValueError or RecursionError."""
    return json.loads(text, parse_int=_parse_int)


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < _MAX_DIGITS else math.inf


def import_detections(
    image_id: str,
    records: list[DetectionRecord],
    size: tuple[int, int],
    categories: Mapping[int, int],
    min_score: float,
) -> tuple[Detections, list[QuarantineRow]]:
    """Check the records of one image of `size` (height, width) and keep those that score `min_score` or more.

    `categories` has the label of each category id that they may have, 0 for those to leave out. Detectors regress
    boxes that overshoot the image, so boxes are clipped to it; one with less than half of its area inside is bad.

    Returns:
        Detections without foregrounds, in file order, and a row for each bad record.
    """
    kept, rows = [Detections.empty(*size)], []
    for record in records:
        try:
            with blame(image_id, record.file):
                label, score, box = _check(record.entry, size, categories)
                if label and score >= min_score and score > 0:
                    kept.append(_detection(label, score, box))
        except CorruptItemError as error:
            rows.append(error.row)
    labels, scores, boxes = (np.concatenate([getattr(d, name) for d in kept]) for name in ("labels", "scores", "boxes"))
    return Detections(labels, scores, boxes), rows


def _detection(label: int, score: float, box: list[float]) -> Detections:
    """One detection, which raises where float32 makes the box empty or the score 0."""
    return Detections(np.array([label]), np.array([score], np.float32), np.array([box], np.float32))


def _check(
    entry: dict[str, Any], size: tuple[int, int], categories: Mapping[int, int]
) -> tuple[int, float, list[float]]:
    category, score, bbox = entry.get("category_id"), entry.get("score"), entry.get("bbox")
    if not isinstance(category, int) or isinstance(category, bool) or category not in categories:
        ids = f"one of the {len(categories)} categories in {min(categories)}..{max(categories)}"
        raise ValueError(f"category_id: expected {ids}, got {category!r}")
    if not _is_number(score) or not 0 <= score <= 1:
        raise ValueError(f"score: expected a number in [0, 1], got {score!r}")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
        raise ValueError(f"bbox: expected four finite numbers [x, y, width, height], got {bbox!r}")
    return categories[category], float(score), _clip(bbox, size)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _clip(bbox: list[float], size: tuple[int, int]) -> list[float]:
    (x, y, box_width, box_height), (height, width) = bbox, size
    if box_width <= 0 or box_height <= 0:
        raise ValueError(f"bbox: expected width and height > 0, got {bbox}")
    box = [max(x, 0.0), max(y, 0.0), min(x + box_width, width), min(y + box_height, height)]
    inside = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    if inside < 0.5 * box_width * box_height:
        raise ValueError(f"bbox: expected a box in the {width}x{height} image, got {bbox}, mostly outside")
    return box


def read_logits(folder: Place, image_id: str, num_labels: int) -> np.ndarray:
    """Read `logits` (L, h, w) of `<image_id>.npz`, at any resolution, as float16.

    Raises:
        CorruptItemError: If the file is missing or damaged, L is not `num_labels`, or a value is not finite.
    """
    path = StoragePath.of(folder) / f"{image_id}.npz"
    with blame(image_id, f"{path.parent.name}/{path.name}"):
        return parse_logits(path.read_bytes(), num_labels)


def parse_logits(content: bytes, num_labels: int) -> np.ndarray:
    """The array `logits` (L, h, w) of an .npz file, as float16.

    Raises:
        ValueError, zipfile.BadZipFile, EOFError: If it is damaged, L is not `num_labels`, or a value is not finite.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if "logits.npy" not in archive.namelist():
            raise ValueError("expected an array named 'logits' in it")
        with archive.open("logits.npy") as file:
            _check_header(file, archive.getinfo("logits.npy").file_size, num_labels)
        with archive.open("logits.npy") as file:
            return _to_half(np.lib.format.read_array(file, allow_pickle=False))


def _check_header(file: IO[bytes], num_bytes: int, num_labels: int) -> None:
    """Check what a .npy of `num_bytes` claims to be, before memory is taken for it."""
    read_header = np.lib.format.read_array_header_2_0
    if np.lib.format.read_magic(file) == (1, 0):
        read_header = np.lib.format.read_array_header_1_0
    shape, _, dtype = read_header(file)
    if len(shape) != 3 or shape[0] != num_labels or min(shape) < 1:
        raise ValueError(f"logits: expected shape ({num_labels}, h, w) for {num_labels} labels, got {shape}")
    if not np.issubdtype(dtype, np.floating):
        raise ValueError(f"logits: expected floating-point values, got {dtype}")
    expected, got = math.prod(shape) * dtype.itemsize, num_bytes - file.tell()
    if expected != got or got > _MAX_LOGITS_BYTES:
        limit = f"at most {_MAX_LOGITS_BYTES} bytes and"
        raise ValueError(f"logits: expected {limit} {expected} for shape {shape}, got {got}")


def _to_half(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = logits.astype(np.float16)
    num_bad = int((~np.isfinite(half)).sum())
    if num_bad:
        raise ValueError(f"logits: expected finite values within float16, got {num_bad} others")
    return half
