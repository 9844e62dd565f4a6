"""Results side by side as a page: one HTML file, without anything from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

from instseg.report.page import table
from instseg.storage import Place, StoragePath

_QUALITY = 85  # JPEG
_STYLE = """
body { font: 1rem/1.4 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem; max-width: 90rem; }
body { color: #222; background: #fff; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.verdict { font-size: 1.15rem; font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #888; }
td, th { padding: .1rem .7rem; text-align: right; vertical-align: top; max-width: 24rem; overflow-wrap: anywhere; }
td:first-child, th:first-child { text-align: left; }
tbody th { font-weight: 400; border: 0; }
tr:hover td { background: #f3f3f3; }
"""


class Section(NamedTuple):
    """A table, whose first row is its head, or a PNG, under a heading."""

    title: str
    table: Sequence[Sequence[str]] = ()
    picture: StoragePath | None = None


def save_comparison_page(place: Place, verdicts: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the verdicts, then the sections.

    Args:
        place: HTML file to write.
        verdicts: Sentences.
        sections: One after the other.
    """
    said = "\n".join(f'<p class="verdict">{escape(verdict)}</p>' for verdict in verdicts)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Comparison</h1>\n{said}\n"
        + "\n".join(map(_section, sections))
        + "\n</body>\n</html>\n"
    )
    StoragePath.of(place).publish(page.encode())


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    if section.table:
        parts.append(table(section.table))
    if section.picture is not None:
        parts.append(_picture(section.picture, section.title))
    return "\n".join([*parts, "</section>"])


def _picture(place: StoragePath, text: str) -> str:
    """Smaller, as a JPEG."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(place.read_bytes()), formats=("PNG",)) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{content}" alt="{escape(text)}">'
