"""The foreground F_d of each detection: seeded GrabCut inside its box (paper section 3.2, reference [30])."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import cv2
import numpy as np

from instseg.structures import Detections, box_to_slices

# The functions of OpenCV whose assertions fail where there is nothing to learn a colour model from: no pixel of the
# object or of the background, or colours too alike for their covariance to be inverted.
_COLOUR_MODELS = ("initGMMs", "calcInverseCovAndDeterm")


def compute_foregrounds(
    image: np.ndarray, detections: Detections, image_id: str, num_iterations: int
) -> tuple[Detections, list[str]]:
    """Segment each detection's object from the rest of the image, given its box.

    The result depends on nothing but the arguments: OpenCV's generator is seeded from (image_id, index of the
    detection) before every call, because unseeded GrabCut gives another mask on every call.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: D detections, boxes inside the image.
        image_id: Part of the seed.
        num_iterations: GrabCut iterations.

    Returns:
        The detections with foregrounds (D, H, W), and what each came from: "grabcut", or "box" (all of the box's
        pixels) where there is nothing to learn a colour model from.

    Raises:
        cv2.error: If GrabCut fails for another reason.
    """
    cv2.setNumThreads(1)  # Ray already runs one task on each CPU
    height, width = image.shape[:2]
    foregrounds = np.zeros((len(detections), height, width), np.bool_)
    sources = []
    for index, box in enumerate(detections.boxes):
        mask = _grabcut(image, box, _seed(image_id, index), num_iterations)
        sources.append("box" if mask is None else "grabcut")
        if mask is None:
            foregrounds[(index, *box_to_slices(box, height, width))] = True
        else:
            foregrounds[index] = mask
    return replace(detections, foregrounds=foregrounds), sources


def _grabcut(image: np.ndarray, box: np.ndarray, seed: int, num_iterations: int) -> np.ndarray | None:
    height, width = image.shape[:2]
    rows, columns = box_to_slices(box, height, width)
    # a frame of one pixel stays outside, so that there is a background to learn from
    x0, y0 = max(columns.start, 1), max(rows.start, 1)
    x1, y1 = min(columns.stop, width - 1), min(rows.stop, height - 1)
    if x0 >= x1 or y0 >= y1:
        return None
    mask = np.zeros((height, width), np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(seed)
    try:
        cv2.grabCut(image, mask, (x0, y0, x1 - x0, y1 - y0), *models, num_iterations, cv2.GC_INIT_WITH_RECT)
    except cv2.error as error:
        if error.code != cv2.Error.StsAssert or not error.func.endswith(_COLOUR_MODELS):
            raise
        return None
    return (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)


def _seed(image_id: str, index: int) -> int:
    digest = hashlib.sha256(f"{image_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1  # OpenCV takes a signed 32-bit integer
