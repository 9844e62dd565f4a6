"""Images of a data directory side by side, with their detections and true instances: one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from instseg.report.pictures import (
    PALETTE,
    PLAIN,
    blend,
    choose_colours,
    draw_boxes,
    like_truth,
    overlay,
    save_figure,
    show,
    write,
)
from instseg.storage import Place
from instseg.structures import InstanceMap, Sample, box_to_slices

MAX_SIDE = 640  # pixels of what is kept of an image, so that large photographs in number fit into memory
RATIOS = 0.2, 1.5  # height to width of a picture, at least and at most; longer images are shown smaller
_ACROSS = 6  # pictures in a row
_WIDTH, _GAP, _CAPTION = 2.4, 0.06, 0.28  # inches
_MAX_CAPTION = 40  # characters


@dataclass(frozen=True)
class DetectionRow:
    """A detection, in words.

    Attributes:
        name: Of its class.
        score: In (0, 1].
        box: xyxy, pixels of the original image.
        foreground_source: What made its foreground.
        foreground_share: Of the pixels of its box, those that are foreground.
        colour: As in HTML.
    """

    name: str
    score: float
    box: tuple[float, ...]
    foreground_source: str
    foreground_share: float
    colour: str


@dataclass(frozen=True)
class InstanceRow:
    """A true instance, in words: its class, its pixels in the original image, its colour as in HTML."""

    name: str
    num_pixels: int
    colour: str


@dataclass(frozen=True, eq=False)
class Cell:
    """What is shown of an image. `Cell.of` makes it.

    Attributes:
        sample: The image, no larger than `MAX_SIDE`, with detections without foregrounds, and with true instances as
            `Sample.known_instances` has them.
        found: The foregrounds, those of higher scores on top; instance d+1 is detection d.
        colours: (D+1, 3) float in 0..1 of the detections; that of a true instance where one covers most of it.
        true_colours: (G+1, 3) float in 0..1 of the true instances.
        size: Height and width of the original image.
        detections: The highest score first.
        instances: Those that have pixels.
    """

    sample: Sample
    found: InstanceMap
    colours: np.ndarray
    true_colours: np.ndarray
    size: tuple[int, int]
    detections: tuple[DetectionRow, ...]
    instances: tuple[InstanceRow, ...]

    @staticmethod
    def of(sample: Sample, foreground_sources: Sequence[str], classes: Sequence[str]) -> Cell:
        """Of a sample whose D detections have foregrounds.

        Args:
            sample: As the data directory has it.
            foreground_sources: D names.
            classes: Class names, [0] is "background".
        """
        found, truth = _paint(sample), sample.known_instances
        wanted, true_colours = None, np.zeros(1, np.int64)
        if truth is not None:
            true_colours = choose_colours(truth, len(sample.instance_labels))
            wanted = like_truth(found, truth, true_colours)
        colours = PALETTE[choose_colours(found.instances, len(found), wanted)]
        return Cell(
            sample=_shrink(sample, truth),
            found=replace(found, instances=found.instances[_every(sample)]),
            colours=colours,
            true_colours=PALETTE[true_colours],
            size=(sample.image.shape[0], sample.image.shape[1]),
            detections=_detection_rows(sample, foreground_sources, classes, colours),
            instances=_instance_rows(sample, truth, classes, PALETTE[true_colours]),
        )

    @property
    def has_truth(self) -> bool:
        """Whether there is ground truth to show."""
        return self.sample.instances is not None

    @property
    def ratio(self) -> float:
        """Height to width of its pictures."""
        height, width = self.size
        return min(max(height / width, RATIOS[0]), RATIOS[1])


def save_contact_sheet(place: Place, cells: Sequence[Cell], classes: Sequence[str]) -> None:
    """Draw a grid of images with boxes and foregrounds, each beside its true instances where any image has some.

    Args:
        place: PNG to write.
        cells: At least one.
        classes: Class names, [0] is "background".
    """
    painters = (draw_detections, draw_truth) if any(cell.has_truth for cell in cells) else (draw_detections,)
    across = min(len(cells), _ACROSS // len(painters))
    cells = sorted(cells, key=lambda cell: cell.ratio)  # those of a row are about as high, which saves paper
    rows = [cells[first : first + across] for first in range(0, len(cells), across)]
    tops = np.cumsum([0.0, *(_WIDTH * max(cell.ratio for cell in row) + _CAPTION for row in rows)])
    pair = len(painters) * (_WIDTH + _GAP) + 2 * _GAP
    figure = Figure(figsize=(across * pair, tops[-1] + _GAP), dpi=150)
    width, height = figure.get_size_inches()
    for row, top in zip(rows, tops, strict=False):  # the last of the tops is the bottom
        for index, cell in enumerate(row):
            size = _WIDTH / width, _WIDTH * cell.ratio / height
            for side, draw in enumerate(painters):
                left = _GAP + index * pair + side * (_WIDTH + _GAP)
                axes = figure.add_axes((left / width, 1 - (_GAP + top) / height - size[1], *size))
                draw(axes, cell, classes)
                if side == 0:
                    axes.text(0, -0.02, _caption(cell), size=7, va="top", transform=axes.transAxes, **PLAIN)
    save_figure(figure, place)


def draw_detections(axes: Axes, cell: Cell, classes: Sequence[str]) -> None:
    """The image, with foregrounds and boxes."""
    show(axes, overlay(cell.sample.image, cell.found.instances, cell.colours))
    draw_boxes(axes, cell.sample, cell.found, cell.colours, classes)


def draw_truth(axes: Axes, cell: Cell, classes: Sequence[str]) -> None:
    """The true instances by class; nothing where there is no ground truth."""
    instances = cell.sample.instances
    if instances is None:
        axes.set_axis_off()
        return
    show(axes, blend(cell.sample.image, instances, cell.true_colours))
    for instance, label in enumerate(cell.sample.instance_labels, 1):
        write(axes, instances == instance, classes[label])


def _caption(cell: Cell) -> str:
    name = cell.sample.image_id
    return name if len(name) <= _MAX_CAPTION else f"{name[:_MAX_CAPTION]}…"


def _paint(sample: Sample) -> InstanceMap:
    detections = sample.detections
    instances = np.zeros(sample.image.shape[:2], np.int32)
    if detections.foregrounds is not None:
        for index in np.argsort(detections.scores, kind="stable"):
            instances[detections.foregrounds[index]] = index + 1
    return InstanceMap(instances, detections.labels, detections.scores, np.arange(len(detections)))


def _every(sample: Sample) -> tuple[slice, slice]:
    """The rows and columns of pixels that are kept."""
    step = slice(None, None, -(-max(sample.image.shape[:2]) // MAX_SIDE))
    return step, step


def _shrink(sample: Sample, truth: np.ndarray | None) -> Sample:
    pixels = _every(sample)
    step = pixels[0].step
    return Sample(
        image_id=sample.image_id,
        image=np.array(Image.fromarray(sample.image).reduce(step)),
        detections=replace(sample.detections, boxes=sample.detections.boxes / step, foregrounds=None),
        instances=None if truth is None else truth[pixels],
        instance_labels=sample.instance_labels,
    )


def _detection_rows(
    sample: Sample, sources: Sequence[str], classes: Sequence[str], colours: np.ndarray
) -> tuple[DetectionRow, ...]:
    found, size = sample.detections, sample.image.shape[:2]
    foregrounds = found.box_masks(*size) if found.foregrounds is None else found.foregrounds
    rows = [
        DetectionRow(
            name=classes[found.labels[index]],
            score=float(found.scores[index]),
            box=tuple(found.boxes[index].tolist()),
            foreground_source=source,
            foreground_share=float(foregrounds[(index, *box_to_slices(found.boxes[index], *size))].mean()),
            colour=to_hex(colours[index + 1]),
        )
        for index, source in enumerate(sources)
    ]
    return tuple(sorted(rows, key=lambda row: -row.score))


def _instance_rows(
    sample: Sample, truth: np.ndarray | None, classes: Sequence[str], colours: np.ndarray
) -> tuple[InstanceRow, ...]:
    if truth is None:
        return ()
    sizes = np.bincount(truth[truth > 0], minlength=len(sample.instance_labels) + 1)
    return tuple(
        InstanceRow(classes[label], int(sizes[instance]), to_hex(colours[instance]))
        for instance, label in enumerate(sample.instance_labels, 1)
        if sizes[instance]
    )
