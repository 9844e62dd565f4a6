"""Masks of COCO annotations: polygons, and run lengths as numbers or as COCO's text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

_OVERSHOOT = 1  # pixels by which polygons that people drew leave the image
_MAX_SHIFT = 60  # bits of a run: pixels of an image


def decode_segmentation(segmentation: object, size: tuple[int, int]) -> np.ndarray:
    """The pixels of an annotation's `segmentation`; an outline finer than a pixel may have none.

    Everything is checked before memory is taken for it, as pycocotools checks nothing.

    Args:
        segmentation: [[x0, y0, x1, y1, ...], ...], whose union it is, drawn as pycocotools does; or RLE: {size: [H, W],
            counts}, column by column, the counts a list or COCO's compressed text.
        size: (H, W) of the image.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: If it is empty, neither of both, or not of an image of this size.
    """
    if isinstance(segmentation, dict):
        return _expand_runs(segmentation, size)
    if not isinstance(segmentation, list):
        raise ValueError(f"segmentation is neither polygons nor RLE: {type(segmentation).__name__}")
    if not segmentation:
        raise ValueError("empty segmentation")
    height, width = size
    polygons: Any = [_check_polygon(polygon, height, width) for polygon in segmentation]  # of any number
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(np.bool_)


def _check_polygon(polygon: object, height: int, width: int) -> list[float]:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        got = f"{len(polygon)} numbers" if isinstance(polygon, list) else type(polygon).__name__
        raise ValueError(f"polygon without 3 points or more: expected [x0, y0, x1, y1, x2, y2, ...], got {got}")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in polygon):
        raise ValueError(f"polygon: expected finite numbers, got {polygon}")
    points = np.array(polygon, np.float64).reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    if low.min() < -_OVERSHOOT or (high > (width + _OVERSHOOT, height + _OVERSHOOT)).any():
        got = f"x {low[0]:g}..{high[0]:g}, y {low[1]:g}..{high[1]:g}"
        raise ValueError(f"polygon outside the image: expected x 0..{width}, y 0..{height}, got {got}")
    length = np.abs(np.diff(points, axis=0, append=points[:1])).max(1).sum()
    if length > 4 * (height + 1) * (width + 1):  # drawing takes memory for each pixel of the outline
        raise ValueError(f"polygon too long: {length:g} pixels around, which fill the {width}x{height} image")
    return points.ravel().tolist()


def _expand_runs(rle: dict[str, object], size: tuple[int, int]) -> np.ndarray:
    if rle.get("size") != list(size):
        raise ValueError(f"RLE of the wrong size: expected {list(size)}, got {rle.get('size')}")
    counts = rle.get("counts")
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("RLE counts: expected integers of 0 or more, got others")
    if sum(runs) != size[0] * size[1]:
        raise ValueError(f"RLE of the wrong size: expected {size[0] * size[1]} pixels, got runs of {sum(runs)}")
    if not any(runs[1::2]):
        raise ValueError("empty segmentation")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def _decompress(text: str) -> list[int]:
    """COCO's text: of each run, from the fourth on its difference to the last but one, five bits a character."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > _MAX_SHIFT:
            raise ValueError(f"RLE counts: cannot be decoded at {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the number's last character, whose highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("RLE counts: cannot be decoded, end in the middle of a number")
    return runs
