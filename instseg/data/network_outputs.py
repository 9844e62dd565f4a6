"""Outputs of other systems: detections as COCO results JSON, semantic logits as <image_id>.npz."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from instseg.data.quarantine import CorruptItemError, QuarantineRow
from instseg.structures import Detections


@dataclass(frozen=True)
class DetectionRecord:
    """One unchecked entry of a results file; `file` says where it stands, as in "detections.json[17]"."""

    file: str
    entry: dict[str, Any]


def read_detections(path: str) -> tuple[dict[str, list[DetectionRecord]], list[QuarantineRow]]:
    """Read COCO results `[{image_id, category_id 1..K, bbox [x, y, w, h], score}, ...]`.

    Returns:
        The records of each image in file order, and the entries that belong to no image.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or not a list.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"detections {path}: no such file")
    try:
        entries = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"detections {path}: not a JSON file: {error}") from None
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


def import_detections(
    image_id: str, records: list[DetectionRecord], size: tuple[int, int], num_labels: int, min_score: float
) -> tuple[Detections, list[QuarantineRow]]:
    """Check the records of one image of `size` (height, width) and keep those that score `min_score` or more.

    Detectors regress boxes that overshoot the image, so boxes are clipped to it; one with less than half of its
    area inside is bad.

    Returns:
        Detections without foregrounds, in file order, and a row for each bad record.
    """
    detections, rows = [], []
    for record in records:
        try:
            label, score, box = _check(record.entry, size, num_labels)
        except ValueError as error:
            rows.append(QuarantineRow(image_id, record.file, str(error)))
            continue
        if score >= min_score and score > 0:
            detections.append((label, score, box))
    labels, scores, boxes = zip(*detections, strict=True) if detections else ((), (), ())
    result = Detections(
        labels=np.array(labels, np.int64),
        scores=np.array(scores, np.float32),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
    )
    return result, rows


def _check(entry: dict[str, Any], size: tuple[int, int], num_labels: int) -> tuple[int, float, list[float]]:
    label, score, bbox = entry.get("category_id"), entry.get("score"), entry.get("bbox")
    if not isinstance(label, int) or isinstance(label, bool) or not 1 <= label < num_labels:
        raise ValueError(f"category_id: expected a class in 1..{num_labels - 1}, got {label!r}")
    if not _is_number(score) or not 0 <= score <= 1:
        raise ValueError(f"score: expected a number in [0, 1], got {score!r}")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
        raise ValueError(f"bbox: expected four finite numbers [x, y, width, height], got {bbox!r}")
    return label, float(score), _clip(bbox, size)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clip(bbox: list[float], size: tuple[int, int]) -> list[float]:
    (x, y, box_width, box_height), (height, width) = bbox, size
    if box_width <= 0 or box_height <= 0:
        raise ValueError(f"bbox: expected width and height > 0, got {bbox}")
    box = [max(x, 0.0), max(y, 0.0), min(x + box_width, width), min(y + box_height, height)]
    inside = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    if inside < 0.5 * box_width * box_height:
        raise ValueError(f"bbox: expected a box in the {width}x{height} image, got {bbox}, mostly outside")
    return box


def read_logits(folder: str, image_id: str, num_labels: int) -> np.ndarray:
    """Read `logits` (L, h, w) of `<image_id>.npz`, at any resolution, as float16.

    Raises:
        CorruptItemError: If the file is missing or damaged, L is not `num_labels`, or a value is not finite.
    """
    path = Path(folder) / f"{image_id}.npz"
    name = f"{Path(folder).name}/{path.name}"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _check_logits(arrays["logits"], num_labels)
    except FileNotFoundError:
        raise CorruptItemError(image_id, name, "file is missing") from None
    except KeyError:
        raise CorruptItemError(image_id, name, "expected an array named 'logits' in it") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptItemError(image_id, name, str(error).replace(str(path), path.name)) from None


def _check_logits(logits: np.ndarray, num_labels: int) -> np.ndarray:
    if logits.ndim != 3 or len(logits) != num_labels or not logits.size:
        raise ValueError(f"logits: expected shape ({num_labels}, h, w) for {num_labels} labels, got {logits.shape}")
    if not np.issubdtype(logits.dtype, np.floating):
        raise ValueError(f"logits: expected floating-point values, got {logits.dtype}")
    with np.errstate(over="ignore"):
        half = logits.astype(np.float16)
    num_bad = int((~np.isfinite(half)).sum())
    if num_bad:
        raise ValueError(f"logits: expected finite values within float16, got {num_bad} others")
    return half
