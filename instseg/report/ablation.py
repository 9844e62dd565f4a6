"""The rows of the paper's Table 1 side by side, and what each lacks of the full system, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from instseg.config import FULL, Ablation, ModelConfig
from instseg.evaluation.semantic import mean_iou
from instseg.evaluation.significance import Comparison, Difference, compare
from instseg.report.tables import TABLE_THRESHOLDS, Evaluation, Table, format_cell


class AblationRow(NamedTuple):
    """A row of the paper's Table 1, or one below it.

    Attributes:
        name: In files, and of the MLflow run.
        title: In tables.
        ablation: What takes part.
        paper: On VOC 2012 val (1449 images): AP^r at .5 to .9, AP^r_vol (Tables 1 and 2), mean IoU (4.2); NaN was not
            reported.
    """

    name: str
    title: str
    ablation: Ablation
    paper: tuple[float, ...] = (np.nan,) * 7


_WITHOUT = Ablation(detection_potentials=False, validity=False)
ROWS = (
    AblationRow("naive", "naive assignment (3.3)", Ablation(identification=False)),
    AblationRow("identification", "identification alone", replace(_WITHOUT, instance_crf=False)),
    AblationRow(
        "no_detection_potentials",
        "1 no detection potentials",
        _WITHOUT,
        (54.6, 48.5, 41.8, np.nan, np.nan, 50.0, 73.4),
    ),
    AblationRow(
        "validity_ignored",
        "2 validity Y ignored",
        Ablation(validity=False),
        (57.5, 51.6, 44.5, np.nan, np.nan, 52.4, 75.3),
    ),
    AblationRow("full", "3 full", FULL, (58.3, 52.4, 45.4, 34.9, 20.1, 53.1, 75.3)),
)

# What the detection head brings, where the network has one, and what the instance CRF makes of it.
_HEAD_ROWS = (
    AblationRow("given_detections", "3 without detection head", Ablation(detection_head=False, shape=False)),
    AblationRow("boxes", "3 with boxes in Eq. 4", Ablation(shape=False)),
    AblationRow("no_instance_crf", "3 without instance CRF", Ablation(instance_crf=False)),
)
_ALL_ROWS = (*ROWS[:-1], *_HEAD_ROWS, ROWS[-1])

# The paper's Tables 1 and 2 in their order: AP^r at .5 to .9, AP^r_vol, mean IoU.
PAPER_COLUMNS = (*(f"{t:.1f}".lstrip("0") for t in TABLE_THRESHOLDS), "vol", "mIoU")
PAPER_ROWS = {
    **{row.title: row.paper for row in ROWS[2:]},
    "SDS (Hariharan et al. 2014)": (43.8, 34.5, 21.3, 8.7, 0.9, np.nan, np.nan),
    "Chen et al. 2015": (46.3, 38.2, 27.0, 13.5, 2.6, np.nan, np.nan),
    "PFN (Liang et al. 2015)": (58.7, 51.3, 42.5, 31.2, 15.7, 52.3, np.nan),
}


TITLES = {row.name: row.title for row in _ALL_ROWS}
PAPER = {
    row.name: row.paper[: len(TABLE_THRESHOLDS)] for row in ROWS if np.isfinite(row.paper[0])
}  # at TABLE_THRESHOLDS


def rows_of(config: ModelConfig) -> tuple[AblationRow, ...]:
    """The rows that a network has, in the order of the table."""
    return _ALL_ROWS if config.detection_head else ROWS


def ablation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Our rows of Table 1 beside the paper's.

    Args:
        evaluations: Of rows by name; one that is not there is left out.
    """
    num_images = next(iter(evaluations.values())).num_images
    columns = (*PAPER_COLUMNS, *(f"paper {column}" for column in PAPER_COLUMNS))
    table = [[f"AP^r [%] (sds), {num_images} images", *columns]]
    for row in _ALL_ROWS:
        if evaluation := evaluations.get(row.name):
            ours = [*evaluation.row(), 100 * mean_iou(evaluation.confusion_after)]
            table.append([row.title, *(format_cell(value) or "–" for value in (*ours, *row.paper))])
    return table


def compare_rows(evaluations: Mapping[str, Evaluation]) -> dict[str, Comparison]:
    """Full minus row, for each row but `full`, by name."""
    full = evaluations["full"].records
    return {name: compare(of_row.records, full) for name, of_row in evaluations.items() if name != "full"}


def difference_table(comparisons: Mapping[str, Comparison]) -> Table:
    """What `compare_rows` found."""
    num_resamples = next(iter(comparisons.values())).num_resamples
    table = [[f"full - row (95 % interval, {num_resamples} resamples of the images)", "AP^r_vol", "mIoU"]]
    for row in _ALL_ROWS:
        if found := comparisons.get(row.name):
            table.append([row.title, format_interval(found.ap_r_vol), format_interval(found.mean_iou)])
    return table


def difference_record(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """What `compare_rows` found in percent, for JSON: row, score, then value, low and high."""
    return {
        name: {"num_resamples": found.num_resamples}
        | {f"ap_r_{threshold}": _percent(difference) for threshold, difference in found.ap_r.items()}
        | {"ap_r_vol": _percent(found.ap_r_vol), "mean_iou_after": _percent(found.mean_iou)}
        for name, found in comparisons.items()
    }


def _percent(difference: Difference) -> dict[str, float]:
    return {name: 100 * value for name, value in difference._asdict().items()}


def format_interval(difference: Difference) -> str:
    """In percent, with the 95 % interval; a dash where there is nothing to score."""
    value, low, high = (100 * number for number in difference)
    return "–" if np.isnan(value) else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def markdown(table: Table) -> str:
    """A table as Markdown."""
    header, *rows = table
    rule = ["-", *(["-:"] * (len(header) - 1))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])
