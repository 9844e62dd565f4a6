from __future__ import annotations

import numpy as np
import pytest

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.semantic import Confusion
from instseg.report.ablation import ablation_table, compare_rows, difference_record, difference_table, markdown
from instseg.report.tables import Evaluation

CLASSES = ("background", "cat", "dog")


def evaluation(iou: float = 0.75, correct: int = 3) -> Evaluation:
    """Two images, each with one cat found with `iou`; no dog anywhere."""
    confusion = Confusion.of(np.array([[8, 0, 0], [4 - correct, correct, 0], [0, 0, 0]]))
    cat = np.array([1])
    found = np.array([0.9]), np.array([[iou]])
    records = [ImageRecord(image_id, cat, *found, cat, confusion, confusion, cat, 0 * cat, cat) for image_id in "ab"]
    return Evaluation.of(records, CLASSES)


def test_the_ablation_table_has_the_papers_numbers() -> None:
    table = ablation_table({"identification": evaluation(0.55), "full": evaluation()})
    lines = markdown(table).splitlines()
    assert lines[2].endswith("| 55.6 | 81.9 |" + " – |" * 7)
    assert lines[3].endswith("| 77.8 | 81.9 | 58.3 | 52.4 | 45.4 | 34.9 | 20.1 | 53.1 | 75.3 |")
    assert len(table) == 3
    assert len({len(line.split("|")) for line in lines}) == 1


def test_each_row_is_compared_with_the_full_system() -> None:
    # The rows are equally good in both images, so every resample has the same difference.
    comparisons = compare_rows({"naive": evaluation(0.55, 4), "full": evaluation()})
    lines = markdown(difference_table(comparisons)).splitlines()
    assert lines[0].startswith("| full - row (95 % interval, 2000 resamples of the images) | AP^r_vol | mIoU |")
    assert lines[2:] == ["| naive assignment (3.3) | +22.2 (+22.2 to +22.2) | -18.1 (-18.1 to -18.1) |"]
    record = difference_record(comparisons)["naive"]
    assert record["num_resamples"] == 2000
    assert record["ap_r_0.6"] == pytest.approx({"value": 100.0, "low": 100.0, "high": 100.0})
    assert record["ap_r_vol"]["value"] == pytest.approx(200 / 9)
    assert record["mean_iou_after"]["low"] == pytest.approx(100 * ((8 / 9 + 3 / 4) / 2 - 1))
