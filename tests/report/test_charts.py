from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from instseg.report.charts import Axis, Bars, Series, bars, columns, lines, matrix
from tests.report.reports import HOSTILE


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart.replace(" class=hollow", ""))


def numbers(element: ElementTree.Element, *names: str) -> list[float]:
    return [float(element.attrib[name]) for name in names]


def test_a_bar_is_as_long_as_its_value_and_negative_ones_go_left() -> None:
    chart = parsed(bars(HOSTILE, ["a", HOSTILE, "c", "d"], [Bars("one", [10.0, 20.0, -5.0, math.nan], "#123456")]))
    (ten, twenty, minus_five) = (numbers(bar, "x", "width") for bar in chart.iter("rect"))
    assert twenty[1] == pytest.approx(2 * ten[1], abs=0.2)
    assert minus_five[1] == pytest.approx(ten[1] / 2, abs=0.2)
    assert sum(minus_five) == pytest.approx(ten[0], abs=0.2)
    assert [text.text for text in chart.iter("text")][-1] == "–"
    assert HOSTILE in [title.text for title in chart.iter("title")]


def test_points_lie_where_the_axes_say_and_none_where_there_is_no_number() -> None:
    x, y = Axis("x", 0, 10, (0, 10)), Axis("y", 0, 100, (0, 100))
    series = [
        Series("a", [(0, 0), (5, 50), (7, math.nan), (10, 100)], "#000"),
        Series(HOSTILE, [(5, 50)], "#000", True),
    ]
    chart = parsed(lines("title", series, x, y))
    (line,) = chart.iter("polyline")
    points = np.array([point.split(",") for point in line.attrib["points"].split()], float)
    assert len(points) == 3
    np.testing.assert_allclose(points[1], points[[0, 2]].mean(0), atol=0.1)
    assert points[0, 1] > points[2, 1]
    (ring,) = chart.iter("circle")
    assert numbers(ring, "cx", "cy") == pytest.approx(points[1].tolist())


def test_columns_and_cells_are_there_for_what_is_there() -> None:
    x, y = Axis("x", 0, 1, (0, 1)), Axis("y", 0, 1, (0, 1))
    heights = [
        numbers(bar, "height")[0] for bar in parsed(columns("t", [0.25, math.nan, 0.5], x, y, "#000")).iter("rect")
    ]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    cells = list(parsed(matrix("t", ["a", HOSTILE], np.array([[1.0, 0.0], [0.25, 0.75]]), "#000")).iter("rect"))
    assert [cell.findtext("title") for cell in cells] == [
        "a → a: 100.0%",
        f"{HOSTILE} → a: 25.0%",
        f"{HOSTILE} → {HOSTILE}: 75.0%",
    ]
