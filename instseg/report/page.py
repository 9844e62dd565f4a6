"""A report as a page: one HTML file that opens from disk, without anything from elsewhere.

A page is made of sections, a section of blocks: text, tables, charts (`charts.py`), galleries (`gallery.py`). Every
block is HTML; whatever comes from data is escaped by who makes the block.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from instseg.storage import Place, StoragePath

REPORT = "report.html"
_QUALITY = 85  # JPEG
_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
# Nothing is loaded, and no script runs but ours, even if something should be escaped wrongly.
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'"


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        name: Of its anchor: letters and dashes.
        title: Its heading, and in the list of contents; plain text.
        blocks: HTML, in their order.
    """

    name: str
    title: str
    blocks: Sequence[str]


def save_page(place: Place, title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> None:
    """Write a page.

    Args:
        place: HTML file to write.
        title: Plain text.
        sections: In their order.
        facts: Where the numbers come from, by name; plain text.
    """
    StoragePath.of(place).publish(page(title, sections, facts).encode())


def page(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The page that `save_page` writes."""
    contents = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections)
    known = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    parts = "\n".join(
        f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n'
        + "\n".join(section.blocks)
        + "\n</section>"
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n<dl>{known}</dl>\n<nav>{contents}</nav>\n</header>\n"
        f"<main>\n{parts}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def text(content: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(content)}</p>"


def claim(content: str) -> str:
    """A paragraph of plain text in large type: what the reader came for."""
    return f'<p class="claim">{escape(content)}</p>'


def note(content: str) -> str:
    """A paragraph in small type: how something was made, what to beware of."""
    return f'<p class="note">{escape(content)}</p>'


def table(rows: Sequence[Sequence[str]], caption: str = "", colours: Sequence[str] = ()) -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        rows: Plain text; the first is the head, and the first column names the rows.
        caption: Plain text.
        colours: As in HTML, of a mark before each row but the head; "" for none.
    """
    head, *body = rows
    marks = [f' style="border-left: .6em solid {colour or "transparent"}"' for colour in colours] or [""] * len(body)
    lines = [f"<caption>{escape(caption)}</caption>" if caption else ""]
    lines.append("<thead><tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr></thead>")
    lines.append("<tbody>")
    for mark, (first, *others) in zip(marks, body, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row"{mark}>{escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</tbody></table></div>'


def picture(content: bytes, alt: str) -> str:
    """An image file, as a JPEG, for it is smaller.

    Args:
        content: A PNG or JPEG file.
        alt: What it shows, in plain text.
    """
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{escape(alt)}">'


def grid(blocks: Sequence[str]) -> str:
    """Charts side by side, as many as there is room for."""
    return f'<div class="grid">{"".join(blocks)}</div>'


def folded(title: str, blocks: Sequence[str]) -> str:
    """Blocks that are shown when the title, in plain text, is clicked."""
    return f"<details><summary>{escape(title)}</summary>{''.join(blocks)}</details>"
