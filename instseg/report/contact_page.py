"""The contact sheet as a page: one HTML file, without anything from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.cells import Cell
from instseg.report.contact_sheet import draw_detections, draw_truth
from instseg.storage import Place, StoragePath

_INCHES, _DPI, _QUALITY = 3.0, 200, 85  # width of a picture; JPEG

_STYLE = """
body { font: 1rem/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff; }
h1, h2, td, th { overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
header, article { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
h1, h2 { flex-basis: 100%; }
article { border-top: 1px solid #ccc; padding: 1rem 0; margin-top: 1rem; }
figure { margin: 0; flex: 0 1 600px; min-width: min(100%, 300px); }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; }
caption { text-align: left; font-weight: bold; }
th { border-bottom: 1px solid #888; }
td, th { padding: .1rem .5rem; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; }
"""


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
    name, head = escape(title), "\n".join(_table(rows) for rows in tables)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{name}</h1>\n{head}\n</header>\n<main>\n"
        + "\n".join(_article(cell, classes) for cell in cells)
        + "\n</main>\n</body>\n</html>\n"
    )
    StoragePath.of(place).publish(page.encode())


def _article(cell: Cell, classes: Sequence[str]) -> str:
    height, width = cell.size
    parts = [f"<h2>{escape(cell.sample.image_id)}</h2>", _figure(cell, classes, draw_detections, "Detections")]
    if cell.has_truth:
        parts.append(_figure(cell, classes, draw_truth, "True instances"))
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
        _table([heads, *detections], f"Detections in {width} × {height} px", [r.colour for r in cell.detections])
    )
    if cell.has_truth:
        instances = [[row.name, str(row.num_pixels)] for row in cell.instances]
        colours = [row.colour for row in cell.instances]
        parts.append(_table([["class", "pixels"], *instances], "True instances", colours))
    return "\n".join(["<article>", *parts, "</article>"])


def _table(rows: Sequence[Sequence[str]], caption: str = "", colours: Sequence[str] = ()) -> str:
    """The first row is the head; each row after it has a mark of its colour where there are colours."""
    head, *body = rows
    marks = [f' style="border-left: .8em solid {colour}"' for colour in colours] or [""] * len(body)
    lines = ["<table>", f"<caption>{escape(caption)}</caption>" if caption else ""]
    lines.append("<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>")
    for mark, (first, *others) in zip(marks, body, strict=True):
        lines.append(f"<tr><td{mark}>{escape(first)}</td>" + "".join(f"<td>{escape(c)}</td>" for c in others) + "</tr>")
    return "\n".join([*filter(None, lines), "</table>"])


def _figure(cell: Cell, classes: Sequence[str], draw: Callable[[Axes, Cell, Sequence[str]], None], caption: str) -> str:
    figure, buffer = Figure(figsize=(_INCHES, _INCHES * cell.ratio), dpi=_DPI), io.BytesIO()
    draw(figure.add_axes((0.0, 0.0, 1.0, 1.0)), cell, classes)
    figure.savefig(buffer, format="jpg", pil_kwargs={"quality": _QUALITY})
    content = base64.b64encode(buffer.getvalue()).decode()
    text = escape(f"{caption} of {cell.sample.image_id}")
    return (
        f'<figure><img src="data:image/jpeg;base64,{content}" alt="{text}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
