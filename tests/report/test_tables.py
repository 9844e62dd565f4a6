from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from instseg.evaluation.ap_r import ImageRecord
from instseg.report.tables import Evaluation, ablation_tables, per_class, summary, write_report

CLASSES = ("background", "cat", "dog")


def evaluation(iou: float = 0.75) -> Evaluation:
    """One cat found with `iou`; no dog anywhere."""
    record = ImageRecord(
        image_id="a",
        labels=np.array([1]),
        scores=np.array([0.9]),
        iou=np.array([[iou]]),
        truth_labels=np.array([1]),
        confusion_before=np.array([[6, 2, 0], [2, 2, 0], [0, 0, 0]]),
        confusion_after=np.array([[8, 0, 0], [1, 3, 0], [0, 0, 0]]),
    )
    return Evaluation.of([record], CLASSES)


def test_metrics_are_percentages() -> None:
    metrics = evaluation().metrics()
    assert (metrics["ap_r_0.7"], metrics["ap_r_0.8"]) == (100.0, 0.0)
    assert metrics["ap_r_vol"] == metrics["authors/ap_r_vol"] == metrics["voc07/ap_r_vol"] == pytest.approx(700 / 9)
    assert metrics["mean_iou_before"] == pytest.approx(100 * (6 / 10 + 2 / 6) / 2)
    assert metrics["mean_iou_after"] == pytest.approx(100 * (8 / 9 + 3 / 4) / 2)


def test_the_summary_says_which_classes_are_left_out() -> None:
    text = summary(evaluation())
    assert "sds       100.0  100.0  100.0  0.0  0.0  77.8" in text
    assert "mean IoU [%]  46.7 -> 81.9" in text
    assert text.endswith("left out of the mean AP^r: dog")


def test_the_report_files_agree(tmp_path: Path) -> None:
    paths = write_report(evaluation(), tmp_path / "new", {"commit": "abc"})
    assert [path.name for path in paths] == ["results.json", "per_class.csv", "report.txt"]
    results = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    assert results["commit"] == "abc"
    assert results["per_class"][2]["sds/ap_r_vol"] is None
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert rows[1]["num_instances"] == "1"
    assert rows[1]["ap_r_0.7"] == "100.0"
    assert rows[2]["ap_r_0.7"] == rows[0]["ap_r_0.7"] == ""
    assert rows[0]["iou_after"] == "88.9"
    assert summary(evaluation()) in paths[2].read_text()


def test_per_class_has_nan_where_there_is_no_number() -> None:
    assert math.isnan(per_class(evaluation())[2]["iou_after"])


def test_the_ablation_table_has_the_papers_numbers() -> None:
    text, markdown = ablation_tables({"identification": evaluation(0.55), "full": evaluation()})
    lines = markdown.splitlines()
    assert lines[2].endswith("| 55.6 | 81.9 |" + " – |" * 7)
    assert lines[3].endswith("| 77.8 | 81.9 | 58.3 | 52.4 | 45.4 | 34.9 | 20.1 | 53.1 | 75.3 |")
    assert len(text.splitlines()) == 3
    assert len({len(line.split("|")) for line in lines}) == 1
