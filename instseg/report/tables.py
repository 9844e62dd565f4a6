"""The scores of a split: text tables, CSV and JSON. AP^r and IoU are given in percent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from instseg.config import MatchingRule
from instseg.evaluation.ap_r import THRESHOLDS, ApR, ImageRecord, ap_r
from instseg.evaluation.calibration import Calibration, calibrations
from instseg.evaluation.coco import SIZES, CocoAp, coco_ap
from instseg.evaluation.panoptic import PanopticQuality, panoptic_quality
from instseg.evaluation.semantic import label_iou, mean_iou, total
from instseg.storage import StoragePath

Table = Sequence[Sequence[str]]  # its first row is the head
RULES: tuple[MatchingRule, ...] = get_args(MatchingRule)
SCORE_TITLES = {"detector_score": "detector score", "validity": "Pr(Y)"}
TABLE_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # the columns of the paper's tables


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of one network on one split.

    Attributes:
        classes: L names, [0] is "background".
        records: Of all images.
        ap_r: AP^r under each matching rule.
        confusion_before: (L, L) int64, semantic segmentation before the CRF.
        confusion_after: (L, L) int64, after it.
        calibration: Of the detections' `detector_score` and `validity`.
        panoptic: Panoptic quality of the instances.
        coco: COCO's mask AP of the instances.
    """

    classes: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    ap_r: dict[MatchingRule, ApR]
    confusion_before: np.ndarray
    confusion_after: np.ndarray
    calibration: dict[str, Calibration]
    panoptic: PanopticQuality
    coco: CocoAp

    @staticmethod
    def of(records: Sequence[ImageRecord], classes: tuple[str, ...]) -> Evaluation:
        """Score the records of all images of a split."""
        num_labels = len(classes)
        return Evaluation(
            classes=classes,
            records=tuple(records),
            ap_r={rule: ap_r(records, num_labels, rule) for rule in RULES},
            confusion_before=total((record.confusion_before for record in records), num_labels),
            confusion_after=total((record.confusion_after for record in records), num_labels),
            calibration=calibrations(records),
            panoptic=panoptic_quality(records, num_labels),
            coco=coco_ap(records, num_labels),
        )

    @property
    def num_images(self) -> int:
        """How many were evaluated."""
        return len(self.records)

    def metrics(self) -> dict[str, float]:
        """Percentages by name, but `nll_nats`; the default rule, `sds`, has no prefix."""
        values = {}
        for rule, scores in self.ap_r.items():
            prefix = "" if rule == "sds" else f"{rule}/"
            values |= {f"{prefix}ap_r_{t}": 100 * scores.mean(t) for t in THRESHOLDS}
            values[f"{prefix}ap_r_vol"] = 100 * scores.mean_volume
        values["mean_iou_before"] = 100 * mean_iou(self.confusion_before)
        values["mean_iou_after"] = 100 * mean_iou(self.confusion_after)
        for name, found in self.calibration.items():
            values |= {f"{name}/ap": 100 * found.ap, f"{name}/ece": 100 * found.ece}
            values |= {f"{name}/brier": 100 * found.brier, f"{name}/nll_nats": found.nll_nats}
        values |= {name: 100 * value for name, value in self.panoptic.means().items()}
        return values | {f"coco/{name}": 100 * value for name, value in self.coco.means().items()}

    def row(self, rule: MatchingRule = "sds") -> list[float]:
        """Percentages at the thresholds of the paper's tables, then the volume."""
        scores = self.ap_r[rule]
        return [100 * value for value in (*map(scores.mean, TABLE_THRESHOLDS), scores.mean_volume)]


def summary(evaluation: Evaluation) -> str:
    """The table that the terminal shows."""
    metrics = evaluation.metrics()
    lines = [f"{evaluation.num_images} images", "", *align(ap_r_table(evaluation)), ""]
    lines += [f"mean IoU [%]  {metrics['mean_iou_before']:.1f} -> {metrics['mean_iou_after']:.1f} (CRF)", ""]
    for table in (panoptic_table(evaluation), coco_table(evaluation), calibration_table(evaluation.calibration)):
        lines += [*align(table), ""]
    return "\n".join([*lines, *absent_classes(evaluation)]).rstrip()


def ap_r_table(evaluation: Evaluation) -> Table:
    """A row of each matching rule."""
    header = ["AP^r [%]", *(f"{t:.1f}".lstrip("0") for t in TABLE_THRESHOLDS), "vol"]
    return [header, *([rule, *(f"{value:.1f}" for value in evaluation.row(rule))] for rule in RULES)]


def panoptic_table(evaluation: Evaluation) -> Table:
    """The means over classes."""
    values = evaluation.panoptic.means().values()
    return [["instances as segments [%]", "PQ", "SQ", "RQ"], ["panoptic quality", *map(_percent_or_dash, values)]]


def coco_table(evaluation: Evaluation) -> Table:
    """The means over classes: all thresholds, two of them, and by the size of the true instances."""
    header = ["COCO mask AP [%]", ".50:.95", ".50", ".75", *SIZES]
    return [header, ["mean over classes", *map(_percent_or_dash, evaluation.coco.means().values())]]


def absent_classes(evaluation: Evaluation) -> list[str]:
    """One sentence that names the classes without ground truth, or none."""
    num_truths = evaluation.ap_r["sds"].num_truths
    absent = [name for name, num in zip(evaluation.classes[1:], num_truths, strict=True) if not num]
    return [f"without ground truth, left out of the mean AP^r: {', '.join(absent)}"] if absent else []


def calibration_table(calibrations: dict[str, Calibration]) -> Table:
    """A row of each kind of score."""
    num = calibrations["detector_score"].count.sum()
    table = [[f"{num} detections, right or wrong", "AP [%]", "ECE [%]", "Brier [%]", "NLL [nats]"]]
    for name, found in calibrations.items():
        percentages = map(_percent_or_dash, (found.ap, found.ece, found.brier))
        table.append([SCORE_TITLES[name], *percentages, "–" if np.isnan(found.nll_nats) else f"{found.nll_nats:.3f}"])
    return table


def _percent_or_dash(value: float) -> str:
    return format_cell(100 * value) or "–"


def per_class(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row of percentages for each class, background included; NaN where a number does not exist."""
    iou_before, iou_after = label_iou(evaluation.confusion_before), label_iou(evaluation.confusion_after)
    rows = []
    for label, name in enumerate(evaluation.classes):
        row: dict[str, Any] = {"class": name, "num_instances": ""}
        if label > 0:
            scores = evaluation.ap_r["sds"]
            row["num_instances"] = int(scores.num_truths[label - 1])
            row |= {f"ap_r_{t}": 100 * scores.values[index, label - 1] for index, t in enumerate(THRESHOLDS)}
            row |= {f"{rule}/ap_r_vol": 100 * evaluation.ap_r[rule].volume[label - 1] for rule in RULES}
            row |= {name: 100 * getattr(evaluation.panoptic, name)[label - 1] for name in ("pq", "sq", "rq")}
            row["coco/ap"] = 100 * evaluation.coco.of_class[label - 1]
        rows.append(row | {"iou_before": 100 * iou_before[label], "iou_after": 100 * iou_after[label]})
    return rows


def class_table(rows: list[dict[str, Any]], columns: list[str]) -> Table:
    """Some columns of what `per_class` returns, the first row their names."""
    return [columns, *([format_cell(row.get(column, "")) for column in columns] for row in rows)]


def format_cell(value: object) -> str:
    """A number with one decimal, NaN as nothing; anything else as it is."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.1f}"
    return str(value)


def align(table: Table) -> list[str]:
    """Lines of a table, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def write_json(place: StoragePath, content: Any) -> None:
    """Write strict JSON: NaN becomes null."""
    place.publish(f"{json.dumps(_without_nan(content), indent=1, allow_nan=False)}\n".encode())


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content
