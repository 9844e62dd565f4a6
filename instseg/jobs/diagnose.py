"""What limits a network, and which kinds of error it makes; a part of an evaluation."""

from __future__ import annotations

from instseg.config import EvaluateConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.errors import errors_by_kind
from instseg.jobs.evaluators import Evaluators
from instseg.jobs.tracking import Tracker
from instseg.report.diagnosis import ORACLE_ROWS, Diagnosis, write_diagnosis
from instseg.report.tables import Evaluation


def diagnose(
    config: EvaluateConfig,
    dataset: PreparedDataset,
    evaluators: Evaluators,
    records: list[ImageRecord],
    tracker: Tracker,
) -> Diagnosis:
    """Evaluate again with each part replaced by the truth; write and log what that is worth, and the errors by kind.

    Args:
        config: Whose `ablation` takes part and whose `out` gets the files.
        dataset: What the actors evaluate on.
        evaluators: They hold the network.
        records: The evaluation with nothing replaced.
        tracker: Of the evaluation's run.

    Raises:
        As `Evaluators.records`.
    """
    evaluations = {}
    for number, row in enumerate(ORACLE_ROWS, 1):
        print(f"diagnosis {number} of {len(ORACLE_ROWS)}: {row.title}", flush=True)
        found = evaluators.records(config.ablation, row.oracle)
        evaluations[row.name] = Evaluation.of(found, dataset.classes)
    as_it_is = Evaluation.of(records, dataset.classes)
    diagnosis = Diagnosis(as_it_is, evaluations, errors_by_kind(records, dataset.num_labels))
    tracker.log_metrics({f"diagnosis/{name}": value for name, value in diagnosis.metrics().items()})
    tracker.log_artifact(write_diagnosis(diagnosis, config.out))
    return diagnosis
