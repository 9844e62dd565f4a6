from __future__ import annotations

import re

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
