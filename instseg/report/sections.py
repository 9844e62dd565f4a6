"""The sections of a report on one evaluation or several; `page.save_page` puts them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from instseg.evaluation.ap_r import THRESHOLDS, ImageRecord, rank_classes
from instseg.evaluation.calibration import Calibration
from instseg.evaluation.errors import image_errors
from instseg.evaluation.semantic import label_iou, mean_iou
from instseg.evaluation.significance import Comparison
from instseg.report.ablation import PAPER, TITLES, ablation_table, difference_table
from instseg.report.charts import COLOURS, Axis, Bars, Series, bars, columns, lines, matrix
from instseg.report.diagnosis import ERROR_TITLES, ORACLE_ROWS, Diagnosis
from instseg.report.page import Section, folded, grid, note, table, text
from instseg.report.tables import (
    SCORE_TITLES,
    TABLE_THRESHOLDS,
    Evaluation,
    absent_classes,
    ap_r_table,
    calibration_table,
    class_table,
    coco_table,
    panoptic_table,
    per_class,
)

CURVE_THRESHOLDS = (0.5, 0.7, 0.9)  # IoU of the precision-recall curves
_PERCENT = (0, 20, 40, 60, 80, 100)
_MAX_CONFUSED = 40  # classes of the matrix
_NUM_PAIRS = 10  # of classes taken for each other


def scores(evaluation: Evaluation) -> Section:
    """The tables that the terminal shows."""
    before, after = (100 * mean_iou(c) for c in (evaluation.confusion_before, evaluation.confusion_after))
    tables = [table(lines) for lines in (ap_r_table(evaluation), panoptic_table(evaluation), coco_table(evaluation))]
    sentence = f"Mean IoU of the semantic segmentation: {before:.1f} % of the network, {after:.1f} % after the CRF."
    return Section("scores", "Scores", [*tables, text(sentence), *map(note, absent_classes(evaluation))])


def of_one(evaluation: Evaluation) -> list[Section]:
    """What there is to see of one evaluation besides its scores."""
    return [part(evaluation) for part in (classes, precision_recall, confusion, calibration)]


def rows(evaluations: Mapping[str, Evaluation], comparisons: Mapping[str, Comparison]) -> Section:
    """The rows of an ablation side by side, and what each lacks of the full system."""
    tables = [table(ablation_table(evaluations)), table(difference_table(comparisons))]
    return Section("rows", "Rows", [*tables, note("A difference whose interval holds 0 is not a result.")])


def limits(diagnosis: Diagnosis) -> Section:
    """What a perfect part would bring, and what the errors of each kind cost."""
    gains = [diagnosis.gain(diagnosis.replaced[row.name]) for row in ORACLE_ROWS]
    parts = bars(
        "AP^r_vol gained with a part replaced by the truth [points]",
        [row.title for row in ORACLE_ROWS],
        [Bars("gain", gains, COLOURS[0])],
        "+.1f",
    )
    kinds = [ERROR_TITLES[kind] for kind in diagnosis.errors]
    costs = [Bars("gain", [100 * found.gain for found in diagnosis.errors.values()], COLOURS[1])]
    errors = bars("AP^r at .5 gained without the errors of a kind [points]", kinds, costs, "+.1f")
    how = "Each part is replaced by the truth alone; the others stay as they are, and gains do not add up."
    tables = folded("Both as tables", [table(diagnosis.oracle_table()), table(diagnosis.error_table())])
    return Section("limits", "What limits it", [text(diagnosis.worth()), grid([parts, errors]), note(how), tables])


def thresholds(evaluations: Mapping[str, Evaluation]) -> Section:
    """AP^r over the IoU threshold of several evaluations, with the paper's points.

    Args:
        evaluations: By the name of a row of `ablation`, or any other title.
    """
    series = []
    for (name, evaluation), colour in zip(evaluations.items(), _cycled(len(evaluations)), strict=True):
        values = [(t, 100 * evaluation.ap_r["sds"].mean(t)) for t in THRESHOLDS]
        series.append(Series(TITLES.get(name, name), values, colour))
        if name in PAPER:
            points = list(zip(TABLE_THRESHOLDS, PAPER[name], strict=True))
            series.append(Series(f"paper: {TITLES[name]}", points, colour, hollow=True))
    axes = Axis("IoU threshold", 0.1, 0.9, THRESHOLDS), Axis("AP^r [%]", 0, 100, _PERCENT)
    said = "The paper's points (Tables 1 and 2) are of other images and networks: VOC 2012 val, 1449 images."
    return Section("thresholds", "AP^r by threshold", [grid([lines("AP^r (sds)", series, *axes)]), note(said)])


def classes(evaluation: Evaluation) -> Section:
    """Bars and a table with a row of each class; the best first in the bars."""
    volume = 100 * evaluation.ap_r["sds"].volume
    order = np.argsort(-np.nan_to_num(volume, nan=-1.0), kind="stable")
    names = [evaluation.classes[1 + index] for index in order]
    before, after = (100 * iou[1:][order] for iou in _semantic_iou(evaluation))
    charts = [
        bars("AP^r_vol [%]", names, [Bars("AP^r_vol", volume[order].tolist(), COLOURS[0])]),
        bars("Panoptic quality [%]", names, [Bars("PQ", (100 * evaluation.panoptic.pq[order]).tolist(), COLOURS[2])]),
        bars(
            "Semantic IoU [%]",
            names,
            [Bars("network", before.tolist(), COLOURS[4]), Bars("after the CRF", after.tolist(), COLOURS[1])],
        ),
    ]
    found = per_class(evaluation)
    unseen = [f"ap_r_{t}" for t in THRESHOLDS if t not in TABLE_THRESHOLDS]
    shown = class_table(found, [column for column in found[-1] if column not in unseen])
    return Section("classes", "Classes", [grid(charts), folded("As a table", [table(shown)])])


def precision_recall(evaluation: Evaluation) -> Section:
    """Curves of all classes together, and of each."""
    ranked = rank_classes(evaluation.records, len(evaluation.classes), "sds")
    where = [THRESHOLDS.index(t) for t in CURVE_THRESHOLDS]
    curves = {
        name: 100 * of_class.precision()[where]
        for name, of_class in zip(evaluation.classes[1:], ranked, strict=True)
        if len(of_class.truth_image)
    }
    if not curves:
        return Section("precision-recall", "Precision and recall", [text("There are no true instances.")])
    mean = _curves("Mean over classes", np.mean(list(curves.values()), axis=0))
    how = "The highest precision at a recall or above it; the area under a class's curve is its AP^r at that IoU."
    each = folded("By class", [grid([_curves(name, values) for name, values in curves.items()])])
    return Section("precision-recall", "Precision and recall", [grid([mean]), note(how), each])


def confusion(evaluation: Evaluation) -> Section:
    """Which classes pixels and instances are taken for."""
    counts = evaluation.confusion_after
    wrong = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    occurring = np.flatnonzero(counts.sum(0) + counts.sum(1))
    kept = np.sort(occurring[np.argsort(-wrong[occurring], kind="stable")][:_MAX_CONFUSED])
    shares = counts[np.ix_(kept, kept)] / np.maximum(counts.sum(1)[kept], 1)[:, None]
    names = [evaluation.classes[index] for index in kept]
    pixels = matrix("Pixels of a class (row) by predicted class (column) [%]", names, shares, COLOURS[0])
    left = (
        f"The {len(kept)} classes with the most wrong pixels of {len(occurring)}. "
        if len(kept) < len(occurring)
        else ""
    )
    pairs = Counter(pair for record in evaluation.records for pair in _mistaken(record))
    listed = [[evaluation.classes[t], evaluation.classes[p], str(num)] for (t, p), num in pairs.most_common(_NUM_PAIRS)]
    instances = table([["true class", "predicted", "instances"], *listed], "Instances of a wrong class, IoU above .5")
    blocks = [pixels, note(f"{left}After the CRF; void is left out."), instances if listed else text("No instance is.")]
    return Section("confusion", "Confusion between classes", blocks)


def calibration(evaluation: Evaluation) -> Section:
    """Whether the detector's scores and Pr(Y) mean what they say."""
    charts = [
        chart
        for (name, found), colour in zip(evaluation.calibration.items(), COLOURS, strict=False)
        for chart in _reliability(SCORE_TITLES[name], found, colour)
    ]
    how = "A bar that ends on the line says what is so; above it the score is too modest, below it too sure."
    return Section(
        "calibration", "Calibration", [grid(charts), note(how), table(calibration_table(evaluation.calibration))]
    )


def _reliability(title: str, found: Calibration, colour: str) -> list[str]:
    x = Axis(title, 0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1))
    most = max(int(found.count.max()), 1)
    right = columns(
        f"Share right by {title}", found.share_right.tolist(), x, Axis("right", 0, 1, x.ticks), colour, True
    )
    return [
        right,
        columns(f"Detections by {title}", found.count.tolist(), x, Axis("detections", 0, most, (0, most)), colour),
    ]


def _curves(title: str, precision: np.ndarray) -> str:
    """Of one class or a mean, (T, R) percentages at CURVE_THRESHOLDS."""
    recalls = np.linspace(0, 100, precision.shape[1])
    series = [
        Series(f"IoU {t:g}", list(zip(recalls.tolist(), row.tolist(), strict=True)), colour)
        for t, row, colour in zip(CURVE_THRESHOLDS, precision, COLOURS, strict=False)
    ]
    return lines(title, series, Axis("recall [%]", 0, 100, _PERCENT), Axis("precision [%]", 0, 100, _PERCENT))


def _mistaken(record: ImageRecord) -> list[tuple[int, int]]:
    errors = image_errors(record)
    wrong = np.flatnonzero(errors.kinds == "class")
    return [(int(record.truth_labels[errors.targets[p]]), int(record.labels[p])) for p in wrong]


def _semantic_iou(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    return label_iou(evaluation.confusion_before), label_iou(evaluation.confusion_after)


def _cycled(num: int) -> Sequence[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(num)]
