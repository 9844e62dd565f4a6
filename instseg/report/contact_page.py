"""The contact sheet as a page: one HTML file, without anything from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.cells import Cell
from instseg.report.contact_sheet import draw_detections, draw_truth
from instseg.report.page import Section, picture, save_page, table
from instseg.storage import Place

_INCHES, _DPI = 3.0, 200  # width of a picture


def save_contact_page(
    place: Place, title: str, cells: Sequence[Cell], classes: Sequence[str], tables: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Write the images larger than on the sheet, each with tables of its detections and true instances.

    Args:
        place: HTML file to write.
        title: What the images are of.
        cells: The images.
        classes: Class names, [0] is "background".
        tables: Of the whole data set, for the head of the page; the first row of each is its own head.
    """
    images = [_article(cell, classes) for cell in cells]
    parts = [Section("data", "Data", list(map(table, tables))), Section("images", "Images", images)]
    save_page(place, title, parts, {})


def _article(cell: Cell, classes: Sequence[str]) -> str:
    height, width = cell.size
    pictures = [_figure(cell, classes, draw_detections, "Detections")]
    if cell.has_truth:
        pictures.append(_figure(cell, classes, draw_truth, "True instances"))
    parts = [f"<h3>{escape(cell.sample.image_id)}</h3>", f'<div class="pictures">{"".join(pictures)}</div>']
    detections = [
        [
            row.name,
            f"{row.score:.3f}",
            " ".join(f"{value:.0f}" for value in row.box),
            row.foreground_source,
            f"{row.foreground_share:.0%}",
        ]
        for row in cell.detections
    ]
    heads = ["class", "score", "box, x y x y", "foreground from", "of its box"]
    parts.append(
        table([heads, *detections], f"Detections in {width} × {height} px", [r.colour for r in cell.detections])
    )
    if cell.has_truth:
        instances = [[row.name, str(row.num_pixels)] for row in cell.instances]
        colours = [row.colour for row in cell.instances]
        parts.append(table([["class", "pixels"], *instances], "True instances", colours))
    return "\n".join(["<article>", *parts, "</article>"])


def _figure(cell: Cell, classes: Sequence[str], draw: Callable[[Axes, Cell, Sequence[str]], None], caption: str) -> str:
    figure, buffer = Figure(figsize=(_INCHES, _INCHES * cell.ratio), dpi=_DPI), io.BytesIO()
    draw(figure.add_axes((0.0, 0.0, 1.0, 1.0)), cell, classes)
    figure.savefig(buffer, format="png")
    shown = picture(buffer.getvalue(), f"{caption} of {cell.sample.image_id}")
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"
