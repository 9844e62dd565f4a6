"""A photograph segmented without any network: boxes and a coarse map that a person could draw in a minute."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from instseg.models.segment import segment_instances
from instseg.report.pictures import save_steps
from instseg.storage import Place
from instseg.structures import Detections, Sample

CLASSES = ("background", "person", "helmet", "flag", "shuttle")
# xyxy pixels, and how sure the detector that they stand for is.
BOXES = {
    "person": ((18, 12, 366, 512), 0.9),
    "helmet": ((276, 342, 512, 512), 0.8),
    "flag": ((0, 0, 98, 512), 0.7),
    "shuttle": ((352, 0, 474, 282), 0.8),
}
# Corners of what the coarse map shows of each class, in pixels; later ones lie on top.
OUTLINES = {
    "flag": [(0, 0), (48, 0), (96, 208), (32, 288), (16, 512), (0, 512)],
    "shuttle": [(400, 0), (432, 0), (464, 272), (352, 272), (384, 64)],
    "person": [
        *((176, 16), (272, 16), (304, 96), (272, 192), (352, 272)),
        *((368, 352), (272, 512), (16, 512), (48, 272), (144, 192)),
    ],
    "helmet": [(336, 352), (448, 352), (512, 432), (512, 512), (288, 512), (288, 416)],
}
CELL = 16  # pixels of the photograph for each of the map's
CERTAINTY = 0.7  # of the class that is drawn; the others share the rest


def save_photograph(place: Place) -> None:
    """Segment NASA's photograph of Eileen Collins, which scikit-image ships, and draw the steps.

    Args:
        place: PNG to write.

    Raises:
        ImportError: If scikit-image is not installed.
    """
    from skimage.data import astronaut

    image = np.asarray(astronaut())  # (512, 512, 3) uint8
    labels = np.array([CLASSES.index(name) for name in BOXES])
    boxes, scores = (np.array(column, np.float32) for column in zip(*BOXES.values(), strict=True))
    detections = Detections(labels, scores, boxes)
    coarse = draw_coarsely(image.shape[0] // CELL, image.shape[1] // CELL)
    others = (1 - CERTAINTY) / (len(CLASSES) - 1)
    probabilities = np.where(coarse == np.arange(len(CLASSES))[:, None, None], CERTAINTY, others)
    found = segment_instances(image, probabilities, detections)
    save_steps(place, Sample("astronaut", image, detections), coarse.repeat(CELL, 0).repeat(CELL, 1), found, CLASSES)


def draw_coarsely(height: int, width: int) -> np.ndarray:
    """(height, width) uint8, the class that `OUTLINES` show."""
    canvas = Image.new("L", (width, height))
    for name, corners in OUTLINES.items():
        ImageDraw.Draw(canvas).polygon([(x / CELL, y / CELL) for x, y in corners], fill=CLASSES.index(name))
    return np.array(canvas)
