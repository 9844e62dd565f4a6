"""The ablation as a whole run: the rows of the paper's Table 1 side by side."""

from __future__ import annotations

from instseg.config import AblateConfig, EvaluateConfig, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.jobs.ending import command, end
from instseg.jobs.evaluate import evaluate_ablation, running_evaluators, start_tracker
from instseg.jobs.roots import check_inputs
from instseg.jobs.tracking import Tracker, how_to_open
from instseg.report.ablation import ablation_tables, compare_rows, difference_record, difference_tables, rows_of
from instseg.report.tables import Evaluation, write_json
from instseg.storage import StoragePath


def ablate(config: AblateConfig) -> dict[str, Evaluation]:
    """Evaluate all rows, each in a nested MLflow run, and write them side by side; the evaluations by row.

    Raises as `evaluate`.
    """
    check_inputs(data=config.data, checkpoint=config.checkpoint)
    dataset, out = PreparedDataset(config.data), StoragePath.of(config.out)
    evaluations: dict[str, Evaluation] = {}
    with (
        running_evaluators(config, dataset) as (config, evaluators),
        start_tracker(config, "ablate", out.name, dataset) as parent,
    ):
        for row in rows_of(config.model or ModelConfig()):
            print(row.name, flush=True)
            of_row = EvaluateConfig(**vars(config), ablation=row.ablation)
            with start_tracker(of_row, "ablate", row.name, dataset, parent) as tracker:
                evaluations[row.name], _ = evaluate_ablation(
                    of_row, row.ablation, dataset, evaluators, out / row.name, tracker
                )
        write_ablation(evaluations, out, parent)
    end(out, ("ablation.md",), [command("compare", str(out))], how_to_open(config.tracking))
    return evaluations


def write_ablation(evaluations: dict[str, Evaluation], out: StoragePath, tracker: Tracker) -> None:
    """Print the rows side by side, write them to ablation.md and ablation.json, and record both in MLflow."""
    comparisons = compare_rows(evaluations)
    texts, markdowns = zip(ablation_tables(evaluations), difference_tables(comparisons), strict=True)
    (out / "ablation.md").publish("\n".join(markdowns).encode())
    rows = {name: evaluation.metrics() for name, evaluation in evaluations.items()}
    write_json(out / "ablation.json", rows | {"differences": difference_record(comparisons)})
    for name in ("ablation.md", "ablation.json"):
        tracker.log_artifact(out / name)
    tracker.log_table([{"row": name, **metrics} for name, metrics in rows.items()], "rows")
    tracker.log_metrics(evaluations["full"].metrics())
    print("\n\n".join(texts))
