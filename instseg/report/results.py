"""What an evaluation leaves for machines: JSON, CSV and the records."""

from __future__ import annotations

import csv
import io
from typing import Any

from instseg.evaluation.calibration import Calibration
from instseg.evaluation.records import RECORDS, write_records
from instseg.report.tables import Evaluation, class_table, per_class, write_json
from instseg.storage import Place, StoragePath

RESULTS = "results.json"


def write_results(evaluation: Evaluation, out: Place, provenance: dict[str, Any]) -> list[StoragePath]:
    """Write results.json, per_class.csv and records.arrow into `out`; their paths."""
    root = StoragePath.of(out)
    rows = per_class(evaluation)
    results = {
        "unit": "percent",
        "num_images": evaluation.num_images,
        "metrics": evaluation.metrics(),
        "per_class": rows,
        "reliability": {name: _reliability(found) for name, found in evaluation.calibration.items()},
        **provenance,
    }
    write_json(root / RESULTS, results)
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(class_table(rows, list(rows[-1])))
    (root / "per_class.csv").publish(lines.getvalue().encode())
    write_records(root / RECORDS, evaluation.records)
    return [root / name for name in (RESULTS, "per_class.csv", RECORDS)]


def _reliability(found: Calibration) -> list[dict[str, float]]:
    """One row of each bin of scores, for JSON; percentages, NaN in a bin without detections."""
    return [
        {"mean_score": 100 * float(score), "share_right": 100 * float(right), "count": int(count)}
        for score, right, count in zip(found.mean_score, found.share_right, found.count, strict=True)
    ]
