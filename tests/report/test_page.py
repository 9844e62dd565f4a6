from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from instseg.report.page import Section, claim, page, picture, table
from tests.report.reports import HOSTILE, report


def test_a_report_is_whole_in_one_file_and_shows_names_as_they_are() -> None:
    text = report()
    assert report() == text
    assert not re.findall(r"https?:|url\(|@import|<link|<iframe", text)
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) <= {"data:"} | {f"#{name[:4]}" for name in anchors(text)}
    assert text.count("<script>") == 1
    assert "<script>alert" not in text
    assert (
        HOSTILE.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("'", "&#x27;")
        .replace('"', "&quot;")
        in text
    )
    for name in re.findall(r'<a href="#([^"]+)"', text):
        assert name in anchors(text)


def anchors(text: str) -> set[str]:
    return set(re.findall(r'<section id="([^"]+)"', text))


def test_a_picture_is_in_the_page_and_what_is_said_is_text() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (3, 2)).save(buffer, "PNG")
    assert picture(buffer.getvalue(), 'a "b"').startswith('<img src="data:image/jpeg;base64,/9j/')
    assert 'alt="a &quot;b&quot;"' in picture(buffer.getvalue(), 'a "b"')
    assert claim(HOSTILE).count("<") == 2
    with pytest.raises(OSError, match="cannot identify"):
        picture(b"no image", "")


def test_titles_tables_and_facts_are_text() -> None:
    evil = "<script>alert('x')</script>"
    blocks = [claim(evil), table([[evil, "b"], ["c", evil]])]
    text = page(evil, [Section("answer", evil, blocks)], {evil: evil})
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") == 9  # title twice, contents, facts twice, heading, claim, table twice
