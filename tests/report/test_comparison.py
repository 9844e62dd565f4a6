from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instseg.evaluation.ap_r import ap_r
from instseg.evaluation.significance import Comparison, Difference, compare
from instseg.report.comparison import (
    Result,
    changes,
    comparison_record,
    largest,
    legend,
    metric_table,
    paper_table,
    setting_table,
    shorter,
    verdict,
)
from instseg.report.tables import Evaluation
from tests.records import CLASSES, one_cat


def result(name: str, ious: list[float], commit: str = "c", **config: Any) -> Result:
    """Images a, b, … with a cat each, found with these IoUs."""
    records = [replace(one_cat(iou), image_id=chr(ord("a") + index)) for index, iou in enumerate(ious)]
    content = {
        "metrics": Evaluation.of(records, CLASSES).metrics() | {"panoptic/quality": 50 * sum(ious), "note": "text"},
        "per_class": [{"class": class_name} for class_name in CLASSES],
        "config": {"out": name, **config},
        "commit": commit,
    }
    return Result(name, content, tuple(records))


def found(value: float, low: float, high: float) -> Comparison:
    difference = Difference(value, low, high)
    return Comparison(120, 2000, {}, difference, difference)


@pytest.mark.parametrize(
    ("comparison", "sentence"),
    [
        (found(0.021, 0.008, 0.034), "B is better than A by 2.1 AP^r_vol (95 % 0.8 to 3.4, 120 images)."),
        (found(-0.021, -0.034, -0.008), "B is worse than A by 2.1 AP^r_vol (95 % 0.8 to 3.4, 120 images)."),
        (
            found(0.003, -0.005, 0.01),
            "No difference can be shown: B - A is +0.3 AP^r_vol (95 % -0.5 to +1.0, 120 images).",
        ),
        (found(0.0, 0.0, 0.0), "No difference can be shown: B - A is +0.0 AP^r_vol (95 % +0.0 to +0.0, 120 images)."),
        (found(*[np.nan] * 3), "Nothing can be said of B: there is no ground truth in the 120 images."),
    ],
)
def test_the_verdict_is_what_the_interval_allows(comparison: Comparison, sentence: str) -> None:
    assert verdict(result("A", [0.5]), result("B", [0.5]), comparison) == sentence


def test_every_number_is_there_with_its_difference() -> None:
    first, second = result("A", [0.55, 0.55]), result("B", [0.75, 0.75])
    comparison = compare(first.records, second.records)
    table = metric_table([first, second], [comparison])
    rows = {row[0]: row[1:] for row in table}
    assert rows["[%]"] == ["A", "B", "B - A"]
    assert rows["ap_r_vol"] == ["55.6", "77.8", "+22.2 (+22.2 to +22.2)"]  # equal in both images, so in all resamples
    assert rows["ap_r_0.6"] == ["0.0", "100.0", "+100.0 (+100.0 to +100.0)"]
    assert rows["panoptic/quality"] == ["55.0", "75.0", "+20.0"]  # from results alone
    assert rows["validity/nll_nats"][2] == "+0.000"
    assert set(rows) - {"[%]"} == set(first.metrics)
    assert "note" not in rows
    assert {"authors/ap_r_vol", "voc07/ap_r_0.5"} <= set(rows)
    assert not [row for row in shorter(table) if row[0].startswith(("authors", "voc07"))]
    assert legend([first, second])[1:] == [["A  A", "2"], ["B  B", "2"]]


def test_settings_that_differ() -> None:
    first = result("A", [0.5], model={"score": "mask", "depth": 3}, seed=0, tracking={"uri": "x"})
    second = result("B", [0.5], commit="d", model={"score": "validity", "depth": 3}, tracking={"uri": "y"}, late=1)
    assert setting_table([first, second]) == [
        ["setting", "A", "B"],
        ["model.score", "mask", "validity"],
        ["seed", "0", "–"],
        ["commit", "c", "d"],
        ["late", "–", "1"],
    ]


def test_changes_are_the_scores_of_single_images() -> None:
    first, second = result("A", [0.55, 0.75, 0.3]), result("B", [0.55, 0.35, 0.95])
    expected = {
        record.image_id: (100 * ap_r([record], 3).mean_volume, 100 * ap_r([other], 3).mean_volume)
        for record, other in zip(first.records, second.records, strict=True)
    }
    assert changes(first, second) == expected
    assert largest(expected, 6) == ["b", "c"]  # a is the same


def test_as_many_that_lost_as_that_gained_are_shown() -> None:
    both = {f"l{k}": (50.0, 50.0 - k) for k in range(1, 4)} | {f"g{k}": (50.0, 50.0 + k) for k in range(1, 10)}
    assert largest(both, 4) == ["l3", "l2", "g8", "g9"]
    assert largest(both, 10) == ["l3", "l2", "l1", *(f"g{k}" for k in range(3, 10))]
    assert largest(both, 100) == ["l3", "l2", "l1", *(f"g{k}" for k in range(1, 10))]
    assert largest(both, 0) == []


def test_the_record_has_verdicts_numbers_and_changes() -> None:
    first, second = result("A", [0.55]), result("B", [0.75])
    record = comparison_record([first, second], [compare(first.records, second.records)])
    assert record["verdicts"] == ["B is better than A by 22.2 AP^r_vol (95 % 22.2 to 22.2, 1 images)."]
    assert record["differences"]["B"]["ap_r_vol"]["low"] == pytest.approx(200 / 9)
    assert record["changes"]["B"]["a"] == pytest.approx((500 / 9, 700 / 9))


def test_the_papers_tables_are_there() -> None:
    rows = {row[0]: row[1:] for row in paper_table()}
    assert rows["3 full"] == ["58.3", "52.4", "45.4", "34.9", "20.1", "53.1", "75.3"]
    assert rows["SDS (Hariharan et al. 2014)"] == ["43.8", "34.5", "21.3", "8.7", "0.9", "–", "–"]
