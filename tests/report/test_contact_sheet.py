"""Contact sheets as pictures and pages."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from instseg.report.cells import MAX_SIDE, Cell
from instseg.report.contact_page import save_contact_page
from instseg.report.contact_sheet import save_contact_sheet
from instseg.structures import Detections, Sample

HOSTILE = '<script>alert("x")</script> & $dog$ \\frac{'
CLASSES = ("background", "cat", HOSTILE)
TABLES = [[["images", "7"], [f"from {HOSTILE}", "7"]]]


def scene(scale: int = 1) -> Sample:
    """A grey image of two true instances; two detections whose foregrounds are these, and one of a box's half."""
    truth = np.zeros((60 * scale, 90 * scale), np.int32)
    truth[10 * scale : 50 * scale, 5 * scale : 40 * scale] = 1
    truth[10 * scale : 50 * scale, 45 * scale : 80 * scale] = 2
    half = np.zeros_like(truth, np.bool_)
    half[: 5 * scale, : 90 * scale] = True
    detections = Detections(
        labels=np.array([2, 2, 1]),
        scores=np.array([0.4, 0.8, 0.9], np.float32),
        boxes=np.array([[0, 0, 90, 10], [45, 10, 80, 50], [5, 10, 40, 50]], np.float32) * scale,
        foregrounds=np.stack([half, truth == 2, truth == 1]),
    )
    image = np.full((*truth.shape, 3), 128, np.uint8)
    return Sample("a", image, detections, np.array([0, 1, 2], np.uint8)[truth], truth, np.array([1, 2]))


def cell(sample: Sample) -> Cell:
    return Cell.of(sample, ["box", *["grabcut"] * 9][: len(sample.detections)], CLASSES)


def without_truth(sample: Sample) -> Sample:
    return replace(sample, semantic=None, instances=None, instance_labels=np.zeros(0, np.int64))


def blank(height: int, width: int) -> Sample:
    return Sample(f"{height}x{width}", np.zeros((height, width, 3), np.uint8), Detections.empty(height, width))


@pytest.mark.parametrize("scale", [1, 20])
def test_a_cell_says_what_is_in_the_image(scale: int) -> None:
    """In pixels of the image, however small the cell's picture of it is."""
    shown = cell(scene(scale))
    assert max(shown.sample.image.shape) <= MAX_SIDE
    assert shown.sample.image.shape[:2] == shown.found.instances.shape
    assert shown.size == (60 * scale, 90 * scale)
    rows = [(row.name, row.box, row.foreground_source, row.foreground_share) for row in shown.detections]
    boxes = [
        tuple(float(scale * value) for value in box) for box in ([5, 10, 40, 50], [45, 10, 80, 50], [0, 0, 90, 10])
    ]
    assert rows == [
        ("cat", boxes[0], "grabcut", 1.0),
        (HOSTILE, boxes[1], "grabcut", 1.0),
        (HOSTILE, boxes[2], "box", 0.5),
    ]
    assert [row.num_pixels for row in shown.instances] == [40 * 35 * scale**2] * 2
    cat, dog, nothing = (row.colour for row in shown.detections)
    assert [row.colour for row in shown.instances] == [cat, dog]
    assert len({cat, dog, nothing}) == 3


def test_what_is_known_of_void_is_shown_and_instances_without_pixels_are_not() -> None:
    sample = scene()
    assert sample.instances is not None
    shown = cell(replace(sample, instances=np.where(sample.instances == 2, -1, sample.instances)))
    assert [row.name for row in shown.instances] == ["cat"]
    assert shown.sample.instances is not None
    assert (shown.sample.instances == -1).any()


def test_overlapping_foregrounds_show_the_best() -> None:
    detections = replace(scene().detections, foregrounds=np.ones((3, 60, 90), np.bool_))
    assert (cell(replace(scene(), detections=detections)).found.instances == 3).all()


def test_a_sheet_has_the_detections_beside_the_truth_in_the_same_colours(tmp_path: Path) -> None:
    shown = cell(scene())
    save_contact_sheet(tmp_path / "sheet.png", [shown], CLASSES)
    with Image.open(tmp_path / "sheet.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64)
    left, right, top, scale = 9, 9 + 369, 9, 360 / 90  # pixels of the pictures' corners, and of a pixel of the image

    def colour(corner: int, x: float, y: float) -> np.ndarray:
        row, column = int(top + y * scale), int(corner + x * scale)
        return picture[row - 4 : row + 4, column - 4 : column + 4].mean((0, 1))

    for x, row in ((10, shown.instances[0]), (72, shown.instances[1])):
        np.testing.assert_allclose(colour(left, x, 42), colour(right, x, 42), atol=6)
        tinted = 0.62 * 255 * np.array(to_rgb(row.colour)) + 0.38 * 255 * (0.25 + 0.75 * 128 / 255)
        np.testing.assert_allclose(colour(left, x, 42), tinted, atol=6)
    np.testing.assert_allclose(colour(left, 86, 57), [128] * 3, atol=3)  # outside nothing changes


def test_sheets_of_any_images(tmp_path: Path) -> None:
    """The most extreme shapes, no detections, no truth, and the truth of some alone."""
    sheet = tmp_path / "new" / "sheet.png"
    sizes = []
    for samples in (
        [blank(1, 1)],
        [blank(1, 900), blank(900, 1)],
        [without_truth(scene())],
        [without_truth(scene())] * 6,
        [scene(), without_truth(scene()), replace(scene(), image_id=100 * "$")],
    ):
        save_contact_sheet(sheet, [cell(sample) for sample in samples], CLASSES)
        with Image.open(sheet) as picture:
            sizes.append(picture.size)
    single, _, one, six, mixed = (width for width, _ in sizes)
    assert single == one < six < mixed + 60
    assert one * 6 == pytest.approx(six, abs=6)


class Page(HTMLParser):
    """Every element is closed; keeps the text, and what elements refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_is_whole_in_one_file_and_shows_names_as_they_are(tmp_path: Path) -> None:
    samples = [replace(scene(), image_id=HOSTILE), without_truth(scene()), blank(5, 9)]
    save_contact_page(tmp_path / "page.html", HOSTILE, [cell(sample) for sample in samples], CLASSES, TABLES)
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "http:" not in text.replace("https:", "http:")
    assert "url(" not in text
    assert not {"link", "iframe", "object"} & {*page.seen}
    assert page.seen.count("script") == 1  # the page's own
    assert page.seen.count("article") == 3
    pictures = [reference for reference in page.references if not reference.startswith("#")]
    assert len(pictures) == 4  # one picture of an image, two with ground truth
    for reference in pictures:
        head, content = reference.split(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert (picture.format, picture.width) == ("JPEG", 600)
    assert page.texts.count(HOSTILE) == 3 + 2 * 2 + 1  # title and heads, detections of two images, a true instance
    assert f"from {HOSTILE}" in page.texts
    for cell_text in ("0.900", "5 10 40 50", "grabcut", "50%", "1400"):
        assert cell_text in page.texts
