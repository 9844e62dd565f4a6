#!/usr/bin/env python
"""What each stage of a training from pixels adds, on images that none has seen: scores, curves, pictures.

    python benchmarks/bench_stages.py runs/stage1 runs/stage2 runs/stage3 --data runs/voc/val --out runs/stages

Evaluations are kept in --out, so that a run that was stopped goes on. Results are stages.json, stages_curves.png and
stages_progress.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, write_result
from instseg.config import EvaluateConfig, TrackingConfig, ValidationConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.records import read_records
from instseg.evaluation.significance import compare
from instseg.jobs.evaluate import evaluate
from instseg.jobs.validate import METRICS, informative, validation_images
from instseg.jobs.validations import records
from instseg.models.checkpoint import find_checkpoint, from_json
from instseg.models.network import InstanceNetwork
from instseg.report.tables import Evaluation
from instseg.report.training_curves import Curve, save_training_curves
from instseg.report.validation_panels import save_progress

NUM_SHOWN = 5  # images
LOSSES = {"semantic loss": "semantic_loss", "instance loss": "instance_loss"}
SCORES = {"mean IoU, network [%]": "mean_iou_before", "mean IoU, CRF [%]": "mean_iou", "AP^r_vol [%]": "ap_r_vol"}
REPORTED = ("mean_iou_before", "mean_iou_after", "ap_r_0.5", "ap_r_0.7", "ap_r_0.9", "ap_r_vol", "pq")


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of the stages, in their order")
    parser.add_argument("--data", required=True, help="prepared images that none was trained on")
    parser.add_argument("--out", required=True, help="folder for the evaluations")
    parser.add_argument("--tracking-uri", default=TrackingConfig().uri, help="where MLflow has the trainings")
    options = parser.parse_args()
    runs, out = [Path(run) for run in options.runs], Path(options.out)
    tracking = TrackingConfig(uri=options.tracking_uri)
    evaluations = [_evaluation(run, options.data, out / run.name, tracking) for run in runs]
    stages = [_scores(run, evaluation) for run, evaluation in zip(runs, evaluations, strict=True)]
    for index in range(1, len(runs)):
        found = compare(evaluations[index - 1].records, evaluations[index].records)
        gains = {"ap_r_vol": found.ap_r_vol, "mean_iou": found.mean_iou}
        stages[index]["gain"] = {name: [100 * value for value in gain] for name, gain in gains.items()}
    for stage in stages:
        print(stage, flush=True)
    curves = {run.name: _losses(run, tracking) for run in runs}
    validated = _validation(runs[0])
    for run, evaluation in zip(runs, evaluations, strict=True):
        curves[run.name] |= _validations(run, validated, evaluation)
    save_training_curves(RESULTS / "stages_curves.png", curves, [*LOSSES, *SCORES])
    _draw(runs, options.data, evaluations[-1])
    print(write_result("stages", {"num_images": evaluations[0].num_images, "stages": stages}))


def _evaluation(run: Path, data: str, out: Path, tracking: TrackingConfig) -> Evaluation:
    if not (out / "records.arrow").is_file():
        evaluate(EvaluateConfig(data, str(out), str(run), tracking=tracking))
    return Evaluation.of(read_records(out / "records.arrow"), PreparedDataset(data).classes)


def _scores(run: Path, evaluation: Evaluation) -> dict[str, Any]:
    metrics, state = evaluation.metrics(), find_checkpoint(run).state
    return {"name": run.name, "epochs": state["epoch"], "steps": state["step"]} | {
        name: metrics[name] for name in REPORTED
    }


def _losses(run: Path, tracking: TrackingConfig) -> dict[str, Curve]:
    """By step, as MLflow has them."""
    client = MlflowClient(tracking.uri)
    (experiment,) = client.search_experiments(filter_string=f"name = '{tracking.experiment}'")
    wanted = f"attributes.run_name = '{run.name}' and tags.workflow = 'train'"
    found = client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time DESC"])[0]
    curves: dict[str, Curve] = {}
    for title, name in LOSSES.items():
        history = client.get_metric_history(found.info.run_id, name)
        curves[title] = sorted((metric.step, metric.value) for metric in history)
    return curves


def _validation(run: Path) -> ValidationConfig:
    return from_json(ValidationConfig, find_checkpoint(run).config["train"]["validation"])


def _validations(run: Path, validated: ValidationConfig, evaluation: Evaluation) -> dict[str, Curve]:
    """Scores by step on the validation images of the first stage: its validations, and for each stage the last one."""
    images = set(validation_images(validated).image_ids)
    of_images = [record for record in evaluation.records if record.image_id in images]
    last, step = Evaluation.of(of_images, evaluation.classes).metrics(), find_checkpoint(run).state["step"]
    same = _validation(run).num_images == validated.num_images
    before = [record for record in records(run) if same and record["step"] < step]
    return {
        title: [*((record["step"], record["metrics"][name]) for record in before), (step, last[METRICS[name]])]
        for title, name in SCORES.items()
    }


def _draw(runs: Sequence[Path], data: str, evaluation: Evaluation) -> None:
    """The images with the most classes, as each stage segments them."""
    dataset = PreparedDataset(data)
    samples = [dataset[index] for index in informative(list(evaluation.records), dataset.image_ids, NUM_SHOWN)]
    networks = {run.name: InstanceNetwork.load(run) for run in runs}
    shown = {
        name: [network.segment(sample.image, sample.detections) for sample in samples]
        for name, network in networks.items()
    }
    save_progress(RESULTS / "stages_progress.png", samples, shown, dataset.classes)


if __name__ == "__main__":
    main()
