from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from instseg.evaluation.records import read_records
from instseg.report.results import write_results
from instseg.report.tables import Evaluation, per_class, summary
from tests.records import CLASSES, one_cat


def evaluation() -> Evaluation:
    return Evaluation.of([one_cat(0.75)], CLASSES)


def test_metrics_are_percentages() -> None:
    metrics = evaluation().metrics()
    assert (metrics["ap_r_0.7"], metrics["ap_r_0.8"]) == (100.0, 0.0)
    assert metrics["ap_r_vol"] == metrics["authors/ap_r_vol"] == metrics["voc07/ap_r_vol"] == pytest.approx(700 / 9)
    assert metrics["mean_iou_before"] == pytest.approx(100 * (6 / 10 + 2 / 6) / 2)
    assert metrics["mean_iou_after"] == pytest.approx(100 * (8 / 9 + 3 / 4) / 2)
    assert metrics["detector_score/ap"] == 50.0
    assert metrics["validity/ap"] == 100.0
    assert metrics["detector_score/ece"] == pytest.approx(100 * (0.5 + 0.75) / 2)
    assert metrics["validity/brier"] == pytest.approx(100 * 0.25**2 / 2)
    assert metrics["validity/nll_nats"] == pytest.approx(-math.log(0.75) / 2)
    assert (metrics["pq"], metrics["rq"], metrics["coco/ap_75"]) == (75.0, 100.0, pytest.approx(100.0))
    assert math.isnan(metrics["coco/ap_large"])


def test_the_summary_says_which_classes_are_left_out() -> None:
    text = summary(evaluation())
    assert "sds       100.0  100.0  100.0  0.0  0.0  77.8" in text
    assert "mean IoU [%]  46.7 -> 81.9" in text
    assert "2 detections, right or wrong  AP [%]  ECE [%]  Brier [%]  NLL [nats]" in text
    assert "detector score                  50.0     62.5       40.6       1.040" in text
    assert "Pr(Y)                          100.0     12.5        3.1       0.144" in text
    assert "panoptic quality           75.0  75.0  100.0" in text
    assert ["mean", "over", "classes", "60.0", "100.0", "100.0", "60.0", "–", "–"] in map(str.split, text.splitlines())
    assert text.endswith("left out of the mean AP^r: dog")


def test_the_report_files_agree(tmp_path: Path) -> None:
    paths = write_results(evaluation(), tmp_path / "new", {"commit": "abc"})
    assert [path.name for path in paths] == ["results.json", "per_class.csv", "records.arrow"]
    results = json.loads(paths[0].read_bytes().decode(), parse_constant=pytest.fail)
    assert results["commit"] == "abc"
    assert results["per_class"][2]["sds/ap_r_vol"] is None
    bins = results["reliability"]["detector_score"]
    assert [row["count"] for row in bins] == [0] * 7 + [1] + [0] * 3 + [1] + [0] * 3
    assert bins[7] == {"mean_score": 50.0, "share_right": 100.0, "count": 1}
    assert bins[0]["share_right"] is None
    np.testing.assert_equal(Evaluation.of(read_records(paths[2]), CLASSES).metrics(), evaluation().metrics())
    with io.StringIO(paths[1].read_bytes().decode(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert rows[1]["num_instances"] == "1"
    assert rows[1]["ap_r_0.7"] == "100.0"
    assert rows[2]["ap_r_0.7"] == rows[0]["ap_r_0.7"] == ""
    assert rows[0]["iou_after"] == "88.9"
    assert (rows[1]["pq"], rows[1]["coco/ap"], rows[2]["pq"]) == ("75.0", "60.0", "")


def test_per_class_has_nan_where_there_is_no_number() -> None:
    assert math.isnan(per_class(evaluation())[2]["iou_after"])
