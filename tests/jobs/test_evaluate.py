from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from instseg.config import (
    FULL,
    AblateConfig,
    EvaluateConfig,
    InstanceCrfConfig,
    ModelConfig,
    SemanticCrfConfig,
    TrackingConfig,
)
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.oracles import true_map
from instseg.evaluation.records import read_records
from instseg.evaluation.semantic import mean_iou, total
from instseg.jobs.ablate import ablate
from instseg.jobs.cluster import JobError
from instseg.jobs.devices import EvaluatorPlan
from instseg.jobs.evaluate import build_network, evaluate
from instseg.jobs.evaluators import Evaluators
from instseg.jobs.mlflow_server import resolve_uri
from instseg.models.checkpoint import save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.report.ablation import ROWS
from instseg.report.tables import Evaluation, summary
from instseg.structures import Sample

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Interfered(PreparedDataset):
    """Does something before image 3 is read."""

    def __init__(self, root: str, interfere: Callable[[], None]) -> None:
        super().__init__(root)
        self.interfere = interfere

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            self.interfere()
        return super().__getitem__(index)

    def __reduce__(self) -> tuple:  # this module cannot be imported by a worker: send it by value
        return _by_value(), (str(self.root), self.interfere)


def _by_value() -> Callable:
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return Interfered


def records_of(dataset: PreparedDataset, num_actors: int) -> list[ImageRecord]:
    plan = EvaluatorPlan("cpu", num_actors, 0.0)
    with Evaluators(dataset, InstanceNetwork(ModelConfig(), dataset.num_labels), plan) as evaluators:
        return evaluators.records(FULL)


def assert_same(first: list[ImageRecord], second: list[ImageRecord]) -> None:
    np.testing.assert_equal([vars(record) for record in first], [vars(record) for record in second])


def test_identical_for_any_number_of_actors_and_after_a_kill(tiny_data: Path, tmp_path: Path) -> None:
    dataset = PreparedDataset(str(tiny_data))
    expected = records_of(dataset, 1)
    assert [record.image_id for record in expected] == sorted(dataset.image_ids)
    assert sum(record.iou.size for record in expected) > 0
    assert_same(records_of(dataset, 2), expected)

    marker = tmp_path / "killed"

    def die_once() -> None:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert_same(records_of(Interfered(str(tiny_data), die_once), 2), expected)
    assert marker.exists()


def test_an_image_that_fails_is_named(tiny_data: Path) -> None:
    def fail() -> None:
        raise ValueError("bad pixels")

    with pytest.raises(ValueError, match=r"^image_3: bad pixels$"):
        records_of(Interfered(str(tiny_data), fail), 1)


def test_actors_that_die_again_and_again_end_the_run(tiny_data: Path) -> None:
    with pytest.raises(JobError, match="an evaluator died: "):
        records_of(Interfered(str(tiny_data), lambda: os.kill(os.getpid(), signal.SIGKILL)), 1)


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> EvaluateConfig:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test")
    return EvaluateConfig(str(tiny_data), str(tmp_path / "report"), tracking=tracking, num_figures=2)


def runs_of(config: EvaluateConfig) -> dict:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=resolve_uri(config.tracking))
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_evaluate_reports_and_records(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = evaluate(config)
    out = Path(config.out)
    results = json.loads((out / "results.json").read_text())
    assert results["num_images"] == evaluation.num_images == len(PreparedDataset(config.data))
    assert results["metrics"] == pytest.approx(evaluation.metrics())
    assert results["config"]["model"]["semantic_crf"]["num_iterations"] == 5
    assert (results["config"]["device"], results["config"]["num_actors"]) == ("cpu", 2)
    assert (out / "per_class.csv").read_text().startswith("class,num_instances,ap_r_0.1")
    assert (out / "panel.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (out / "report.txt").read_text().splitlines()[2] in printed
    assert config.out in printed
    assert "evaluating 7 images with 2 actors on CPUs; the cluster has 2 CPUs and 0 GPUs on 1 node" in printed
    assert "mlflow ui --backend-store-uri" in printed
    run = runs_of(config)["report"]
    assert run.info.status == "FINISHED"
    assert run.data.params["device"] == "cpu"
    assert run.data.metrics["authors/ap_r_vol"] == pytest.approx(evaluation.metrics()["authors/ap_r_vol"])
    artifacts = {path.name for path in (out.parent / "mlartifacts").rglob("*") if path.is_file()}
    assert artifacts == {
        *("results.json", "per_class.csv", "report.txt", "records.arrow"),
        *("calibration.png", "panel.png"),
    }
    records = read_records(out / "records.arrow")
    assert Evaluation.of(records, evaluation.classes).metrics() == evaluation.metrics()
    detections = [sample.detections for sample in PreparedDataset(config.data)]
    assert [len(record.validity) for record in records] == [len(found) for found in detections]
    assert any((record.validity != record.detection_scores).any() for record in records)
    assert any(record.matched.any() for record in records)


def test_a_diagnosis_is_printed_written_and_recorded(
    config: EvaluateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = evaluate(replace(config, num_figures=0, diagnose=True))
    out, printed = Path(config.out), capsys.readouterr().out
    assert summary(evaluation) + "\n\n" + (out / "diagnosis.txt").read_text() in printed
    assert "diagnosis 1 of 6: true semantic map\n" in printed
    metrics = json.loads((out / "diagnosis.json").read_text())["metrics"]
    assert metrics["as_it_is/ap_r_vol"] == pytest.approx(evaluation.metrics()["ap_r_vol"])
    assert metrics["true_map/mean_iou_after"] > evaluation.metrics()["mean_iou_after"] + 10
    assert metrics["true_map_and_detections/ap_r_vol"] > 99
    logged = {name: value for name, value in runs_of(config)["report"].data.metrics.items() if "diagnosis/" in name}
    assert logged == pytest.approx({f"diagnosis/{name}": value for name, value in metrics.items()})
    artifacts = {path.name for path in (out.parent / "mlartifacts").rglob("*") if path.is_file()}
    assert artifacts > {"diagnosis.txt", "diagnosis.json"}


def test_a_true_map_reaches_the_crf_of_a_semantic_network(tiny_data: Path) -> None:
    """It has no use for the data's logits, so the truth must come in behind it."""
    dataset = PreparedDataset(str(tiny_data))
    network = InstanceNetwork(ModelConfig(semantic="lraspp_mobilenet_v3_large"), dataset.num_labels).eval()
    with Evaluators(dataset, network, EvaluatorPlan("cpu", 1, 0.0)) as evaluators:
        records = evaluators.records(FULL, true_map)
    assert mean_iou(total((record.confusion_before for record in records), dataset.num_labels)) == 1.0


def test_ablate_puts_the_rows_side_by_side(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ablate(AblateConfig(config.data, config.out, tracking=config.tracking, num_figures=0))
    assert list(rows) == [row.name for row in ROWS]
    alone = evaluate(replace(config, num_figures=0, ablation=ROWS[1].ablation))
    assert alone.metrics() == pytest.approx(rows["identification"].metrics(), nan_ok=True)
    out = Path(config.out)
    table = (out / "ablation.md").read_text().splitlines()
    assert len(table) == 2 + len(ROWS) + 1 + 2 + len(ROWS) - 1
    assert "| 53.1 | 75.3 |" in table[1 + len(ROWS)]
    printed = capsys.readouterr().out
    assert "full - row (95 % interval, 2000 resamples of the images)" in printed
    written = json.loads((out / "ablation.json").read_text())
    assert written["full"] == pytest.approx(rows["full"].metrics())
    naive, difference = written["naive"], written["differences"]["naive"]["ap_r_vol"]
    assert difference["value"] == pytest.approx(written["full"]["ap_r_vol"] - naive["ap_r_vol"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    runs = runs_of(config)
    parents = {runs[row].data.tags["mlflow.parentRunId"] for row in rows}
    assert len(parents) == 1
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


CLASSES = ["background", "square", "circle", "cross"]
TRAINED = replace(
    ModelConfig(),
    background="literal",
    semantic_crf=SemanticCrfConfig(spatial_weight=2.0),
    instance_crf=InstanceCrfConfig(num_iterations=7),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A network trained with settings that are not the defaults."""
    network = InstanceNetwork(TRAINED, 4)
    network.instance_crf.spatial_weight.data.fill_(0.25)
    settings = {"model": asdict(TRAINED), "num_labels": 4, "classes": CLASSES}
    save_checkpoint(tmp_path / "epoch_1", network.state_dict(), settings)
    return tmp_path / "epoch_1"


def test_a_checkpoint_brings_its_model(config: EvaluateConfig, checkpoint: Path) -> None:
    dataset = PreparedDataset(config.data)
    config = replace(config, checkpoint=str(checkpoint))
    loaded = build_network(config, dataset)
    assert loaded.config == TRAINED
    assert loaded.instance_crf.spatial_weight.item() == 0.25
    asked = replace(TRAINED, background="rescored")  # the default, and not what it was trained with
    assert build_network(replace(config, model=asked), dataset).config == asked
    with pytest.raises(ValueError, match=r"trained with model\.semantic 'logits', not 'fcn8s'"):
        build_network(replace(config, model=replace(TRAINED, semantic="fcn8s")), dataset)


def test_initial_weights_beside_a_checkpoint_are_refused(config: EvaluateConfig, checkpoint: Path) -> None:
    message = r"model\.semantic_crf\.spatial_weight: 1\.0 has no effect beside checkpoint .*trained from 2\.0"
    with pytest.raises(ValueError, match=message):
        build_network(
            replace(config, checkpoint=str(checkpoint), model=ModelConfig()),
            PreparedDataset(config.data),
        )


def test_classes_in_another_order_are_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    network = InstanceNetwork(ModelConfig(), 4)
    settings = {"model": asdict(ModelConfig()), "num_labels": 4, "classes": ["background", "square", "cross", "circle"]}
    save_checkpoint(tmp_path / "epoch_1", network.state_dict(), settings)
    with pytest.raises(ValueError, match="was trained with class 2 = 'cross', in the data it is 'circle'"):
        build_network(replace(config, checkpoint=str(tmp_path / "epoch_1")), PreparedDataset(config.data))
