"""What a network sees of each detection: a crop of its box and a margin, on a grid of one size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from instseg.shapes import Float
from instseg.structures import Detections, box_to_slices

SIZE = 64  # rows and columns of the grid
_MARGIN = 0.15  # of the box's sides, because a box may be too small
# The planes of a crop.
COLOURS = slice(0, 3)  # normalised RGB
OF_CLASS = 3  # Pr(l_d)
OF_BACKGROUND = 4
OF_OTHERS = 5  # the greatest of the other classes' probabilities
BOX = 6  # 1 inside
RIVALS = 7  # 1 inside a box of the same class with a higher score
GIVEN = 8  # the foreground that came with the detection, such as GrabCut's; the box where none did
ACROSS = 9  # |x|, where the box has -1..1; a mirrored crop has the same
DOWN = 10  # y, where the box has -1..1
NUM_PLANES = 11


def crop_planes(
    image: Float[Tensor, "H W 3"], probabilities: Float[Tensor, "L H W"], detections: Detections
) -> Float[Tensor, "D planes size size"]:
    """The planes above for each detection.

    Args:
        image: RGB 0..255.
        probabilities: Of the classes, before the CRF.
        detections: D detections inside the image.
    """
    if len(detections) == 0:
        return image.new_zeros(0, NUM_PLANES, SIZE, SIZE)
    labels = torch.from_numpy(detections.labels).to(image.device)[:, None, None, None].expand(-1, 1, SIZE, SIZE)
    channels = torch.cat([(image.permute(2, 0, 1) / 255 - 0.45) / 0.25, probabilities])
    cuts = windows(detections, *image.shape[:2])
    crops = torch.stack([to_grid(channels[:, y, x]) for y, x in cuts])
    classes = crops[:, 3:]
    others = classes[:, 1:].scatter(1, labels - 1, 0.0).amax(1, keepdim=True)
    geometry = torch.from_numpy(_geometry(detections, *image.shape[:2])).to(crops)
    if detections.foregrounds is not None:
        for index, (y, x) in enumerate(cuts):
            given = torch.from_numpy(detections.foregrounds[index : index + 1, y, x])
            geometry[index, GIVEN - BOX] = to_grid(given.to(crops))[0]
    return torch.cat([crops[:, COLOURS], classes.gather(1, labels), classes[:, :1], others, geometry], 1)


def windows(detections: Detections, height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each detection's crop: its box and the margin, inside the image."""
    margins = _MARGIN * (detections.boxes[:, 2:] - detections.boxes[:, :2])
    grown = np.concatenate([detections.boxes[:, :2] - margins, detections.boxes[:, 2:] + margins], 1)
    return [box_to_slices(box, height, width) for box in grown]


def paste(
    logits: Float[Tensor, "D size size"], detections: Detections, height: int, width: int
) -> Float[Tensor, "D H W"]:
    """Probabilities in the image's pixels from logits on the grid; 0 outside the windows."""
    pasted = [logits.new_zeros(0, height, width)]  # written in place, each window would copy the gradient of all
    for mask, (y, x) in zip(logits, windows(detections, height, width), strict=True):
        size = (y.stop - y.start, x.stop - x.start)
        resized = interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0].sigmoid()
        pasted.append(pad(resized, (x.start, width - x.stop, y.start, height - y.stop)))
    return torch.cat(pasted)


def to_grid(planes: Float[Tensor, "C h w"]) -> Float[Tensor, "C size size"]:
    """A window's planes on the grid; what is finer than the grid is averaged."""
    return interpolate(planes[None], size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)[0]


def _geometry(detections: Detections, height: int, width: int) -> np.ndarray:
    """(D, 5, SIZE, SIZE) float32, the planes from BOX on, with the box for what was given."""
    planes = np.zeros((len(detections), NUM_PLANES - BOX, SIZE, SIZE), np.float32)
    centres = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    for index, (y, x) in enumerate(windows(detections, height, width)):
        rows, columns = y.start + centres * (y.stop - y.start), x.start + centres * (x.stop - x.start)
        x0, y0, x1, y1 = detections.boxes[index]
        same_class = detections.labels == detections.labels[index]
        better = same_class & (detections.scores > detections.scores[index])
        planes[index, 0] = _inside(detections.boxes[index], rows, columns)
        planes[index, RIVALS - BOX] = np.any([_inside(box, rows, columns) for box in detections.boxes[better]], axis=0)
        planes[index, GIVEN - BOX] = planes[index, 0]
        planes[index, ACROSS - BOX] = np.abs(2 * columns - x0 - x1) / (x1 - x0)
        planes[index, DOWN - BOX] = ((2 * rows - y0 - y1) / (y1 - y0))[:, None]
    return planes


def _inside(box: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return ((rows >= box[1]) & (rows < box[3]))[:, None] & (columns >= box[0]) & (columns < box[2])
