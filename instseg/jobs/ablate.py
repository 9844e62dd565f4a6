"""The ablation as a whole run: the rows of the paper's Table 1 side by side."""

from __future__ import annotations

from instseg.config import AblateConfig, EvaluateConfig, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.jobs.ending import command, end
from instseg.jobs.evaluate import NUM_PANELS, evaluate_ablation, running_evaluators, start_tracker, write_page
from instseg.jobs.roots import check_inputs
from instseg.jobs.tracking import Tracker, how_to_open
from instseg.report import sections
from instseg.report.ablation import ablation_table, compare_rows, difference_record, difference_table, markdown, rows_of
from instseg.report.gallery import Selection
from instseg.report.page import REPORT, Section
from instseg.report.tables import Evaluation, align, write_json
from instseg.storage import StoragePath


def ablate(config: AblateConfig) -> dict[str, Evaluation]:
    """Evaluate all rows, each in a nested MLflow run, and write them side by side; the evaluations by row.

    Raises as `evaluate`.
    """
    check_inputs(data=config.data, checkpoint=config.checkpoint)
    dataset, out = PreparedDataset(config.data), StoragePath.of(config.out)
    evaluations: dict[str, Evaluation] = {}
    of_full = Selection(config.num_gallery)
    with (
        running_evaluators(config, dataset) as (config, evaluators),
        start_tracker(config, "ablate", out.name, dataset) as parent,
    ):
        for row in rows_of(config.model or ModelConfig()):
            print(row.name, flush=True)
            selection = of_full if row.name == "full" else Selection(NUM_PANELS)
            of_row = EvaluateConfig(**vars(config), ablation=row.ablation)
            with start_tracker(of_row, "ablate", row.name, dataset, parent) as tracker:
                evaluations[row.name] = evaluate_ablation(
                    of_row, row.ablation, dataset, evaluators, out / row.name, tracker, selection
                )
        parts = write_ablation(evaluations, out, parent)
        write_page(config, "Ablation", parts, of_full, dataset, parent)
    end(out, (REPORT, "ablation.md"), [command("compare", str(out))], how_to_open(config.tracking))
    return evaluations


def write_ablation(evaluations: dict[str, Evaluation], out: StoragePath, tracker: Tracker) -> list[Section]:
    """Print the rows side by side, write them to ablation.md and ablation.json, and record both in MLflow.

    Returns:
        The sections of a report: the rows, then what there is to see of the full system.
    """
    comparisons = compare_rows(evaluations)
    tables = ablation_table(evaluations), difference_table(comparisons)
    (out / "ablation.md").publish("\n".join(map(markdown, tables)).encode())
    rows = {name: evaluation.metrics() for name, evaluation in evaluations.items()}
    write_json(out / "ablation.json", rows | {"differences": difference_record(comparisons)})
    for name in ("ablation.md", "ablation.json"):
        tracker.log_artifact(out / name)
    tracker.log_table([{"row": name, **metrics} for name, metrics in rows.items()], "rows")
    tracker.log_metrics(evaluations["full"].metrics())
    print("\n\n".join("\n".join(align(table)) for table in tables))
    full = evaluations["full"]
    side_by_side = [sections.rows(evaluations, comparisons), sections.thresholds(evaluations)]
    return [*side_by_side, sections.scores(full), *sections.of_one(full)]
