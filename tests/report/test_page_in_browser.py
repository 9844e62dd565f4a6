"""The report as a person has it: opened from disk in a real browser, on a desk and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.reports import NUM_SHOWN, report

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright, of the dev dependencies, is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path, and CHROMIUM names none: install the distribution's")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report(), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.close()


def articles(page: Any) -> list[dict[str, str]]:
    """The data-* attributes of those that are seen, from top to bottom."""
    return page.evaluate("[...document.querySelectorAll('article:not([hidden])')].map((a) => ({...a.dataset}))")


def test_it_opens_without_errors_and_asks_for_nothing_else(opened: Any, path: Path) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [path.as_uri()]
    loaded = (
        "[...document.querySelectorAll('.pictures image')].map((i) => i.href.baseVal.startsWith('data:image/jpeg'))"
    )
    assert opened.evaluate(loaded) == [True] * (4 * NUM_SHOWN)
    opened.evaluate("fetch('http://127.0.0.1:1/').catch(() => 0)")  # the page's policy refuses it
    assert any("Content Security Policy" in text for text in opened.said)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 844})
    opened.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && !e.closest('svg')
              && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert opened.evaluate(wide) == []


def test_the_gallery_is_sorted(opened: Any) -> None:
    scores = [float(one["score"]) for one in articles(opened)]
    assert len(set(scores)) > 3
    assert scores == sorted(scores)
    opened.select_option("select[name=sort]", "best")
    assert [float(one["score"]) for one in articles(opened)] == sorted(scores, reverse=True)
    opened.select_option("select[name=sort]", "name")
    names = [one["name"] for one in articles(opened)]
    assert names == sorted(names)


@pytest.mark.parametrize(("select", "data"), [("label", "labels"), ("kind", "kinds")])
def test_the_gallery_is_filtered(opened: Any, select: str, data: str) -> None:
    everything = [one[data].split() for one in articles(opened)]
    values = opened.evaluate(f"[...document.querySelectorAll('select[name={select}] option')].map((o) => o.value)")
    assert set(values) == {"", *(value for own in everything for value in own)}
    for value in values[1:]:
        opened.select_option(f"select[name={select}]", value)
        left = [one[data].split() for one in articles(opened)]
        assert sorted(left) == sorted(own for own in everything if value in own)
        assert opened.inner_text("output") == f"{len(left)} of {NUM_SHOWN} images"
        said = opened.inner_text(f"select[name={select}] option:checked")
        assert said.endswith(f"({len(left)})")
    opened.select_option(f"select[name={select}]", "")
    assert len(articles(opened)) == NUM_SHOWN
