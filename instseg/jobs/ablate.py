"""The ablation as a whole run: the rows of the paper's Table 1 side by side."""

from __future__ import annotations

from pathlib import Path

from instseg.config import AblateConfig, EvaluateConfig
from instseg.data.dataset import PreparedDataset
from instseg.jobs.evaluate import evaluate_ablation, running_evaluators, start_tracker
from instseg.jobs.tracking import how_to_open
from instseg.report.tables import ROWS, Evaluation, ablation_tables, write_json


def ablate(config: AblateConfig) -> dict[str, Evaluation]:
    """Evaluate all `ROWS`, each in a nested MLflow run, and write them side by side; the evaluations by row.

    Raises as `evaluate`.
    """
    dataset, out = PreparedDataset(config.data), Path(config.out)
    evaluations: dict[str, Evaluation] = {}
    with running_evaluators(config, dataset) as (config, evaluators), start_tracker(config, "ablate", out) as parent:
        for row in ROWS:
            print(row.name, flush=True)
            of_row = EvaluateConfig(**vars(config), ablation=row.ablation)
            with start_tracker(of_row, "ablate", out / row.name, parent) as tracker:
                evaluations[row.name], _ = evaluate_ablation(
                    of_row, row.ablation, dataset, evaluators, out / row.name, tracker
                )
        text, markdown = ablation_tables(evaluations)
        (out / "ablation.md").write_text(markdown)
        write_json(out / "ablation.json", {name: evaluation.metrics() for name, evaluation in evaluations.items()})
        for name in ("ablation.md", "ablation.json"):
            parent.log_artifact(out / name)
        parent.log_metrics(evaluations["full"].metrics())
    print(f"{text}\n\nreport: {config.out}\nMLflow: {how_to_open(config.tracking)}")
    return evaluations
