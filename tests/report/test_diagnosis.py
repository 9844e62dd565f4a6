from __future__ import annotations

import json
from pathlib import Path

import pytest

from instseg.evaluation.errors import KINDS, errors_by_kind
from instseg.report.diagnosis import ERROR_TITLES, ORACLE_ROWS, Diagnosis, write_diagnosis
from instseg.report.tables import Evaluation
from tests.records import CLASSES, one_cat


def diagnosis(as_it_is: float = 0.45, **replaced: float) -> Diagnosis:
    """Rows whose one cat has the IoU of that name, or that of `as_it_is`."""
    evaluations = {row.name: Evaluation.of([one_cat(replaced.get(row.name, as_it_is))], CLASSES) for row in ORACLE_ROWS}
    records = [one_cat(as_it_is)]
    return Diagnosis(Evaluation.of(records, CLASSES), evaluations, errors_by_kind(records, len(CLASSES)))


def test_the_tables_show_scores_gains_and_errors() -> None:
    lines = diagnosis(true_map=0.95, true_boxes=0.75, true_scores=0.35).text().splitlines()
    rows = {line[:32].strip(): line[32:].split() for line in lines[: 2 + len(ORACLE_ROWS)]}
    assert rows["replaced by the truth: AP^r [%]"] == [".5", ".7", ".9", "vol", "gain", "mIoU"]
    assert rows["nothing"] == ["0.0", "0.0", "0.0", "44.4", "81.9"]
    assert rows["true semantic map"] == ["100.0", "100.0", "100.0", "100.0", "+55.6", "81.9"]
    assert rows["true boxes"] == ["100.0", "100.0", "0.0", "77.8", "+33.3", "81.9"]
    assert rows["true scores"] == ["0.0", "0.0", "0.0", "33.3", "-11.1", "81.9"]
    assert [line.split()[-2:] for line in lines if line.startswith("bad mask")] == [["0", "+0.0"], ["1", "+100.0"]]


def test_the_sentence_ranks_the_parts() -> None:
    text = diagnosis(true_foregrounds=0.55, true_boxes=0.75, true_scores=0.35).text()
    assert "\nBetter boxes are worth up to 33 points of AP^r_vol, better foregrounds 11, " in text
    assert ", better scores 0" in text


def test_all_kinds_of_errors_have_a_title() -> None:
    assert tuple(ERROR_TITLES) == KINDS


def test_the_file_agrees(tmp_path: Path) -> None:
    found = diagnosis(true_map=0.95)
    content = write_diagnosis(found, tmp_path)
    assert content.name == "diagnosis.json"
    stored = json.loads(content.read_bytes().decode(), parse_constant=pytest.fail)
    assert (stored["unit"], stored["num_images"]) == ("percent", 1)
    metrics = stored["metrics"]
    assert metrics == pytest.approx(found.metrics())
    assert metrics["as_it_is/ap_r_vol"] == pytest.approx(400 / 9)
    assert metrics["true_map/ap_r_vol_gain"] == pytest.approx(500 / 9)
    assert metrics["true_map/ap_r_0.9"] == 100.0
    assert (metrics["errors/mask_0.3/count"], metrics["errors/mask_0.3/ap_r_0.5_gain"]) == (1, 100.0)
    assert len(metrics) == 5 * (1 + len(ORACLE_ROWS)) + len(ORACLE_ROWS) + 2 * len(KINDS)
