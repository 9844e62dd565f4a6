"""Images of a data directory side by side, with their detections and true instances: one PNG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.cells import Cell
from instseg.report.pictures import (
    PLAIN,
    blend,
    draw_boxes,
    overlay,
    save_figure,
    show,
    write,
)
from instseg.storage import Place

_ACROSS = 6  # pictures in a row
_WIDTH, _GAP, _CAPTION = 2.4, 0.06, 0.28  # inches
_MAX_CAPTION = 40  # characters


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
        write(axes, instances == instance, classes[int(label)])


def _caption(cell: Cell) -> str:
    name = cell.sample.image_id
    return name if len(name) <= _MAX_CAPTION else f"{name[:_MAX_CAPTION]}…"
