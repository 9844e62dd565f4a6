from __future__ import annotations

import io
import json
import math
import os
import signal
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from instseg.config import (
    FULL,
    AblateConfig,
    Ablation,
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
from instseg.jobs import evaluators as actors
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
from tests.jobs.alone import records_alone
from tests.jobs.ending import check_ending

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


ABLATION = Ablation(instance_crf=False)  # no row of the table


class Evaluated(NamedTuple):
    config: EvaluateConfig
    evaluation: Evaluation
    printed: str


@pytest.fixture(scope="module")
def evaluated(ray_cluster: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """One evaluation with everything in it."""
    folder, printed = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="test")
    options = {"ablation": ABLATION, "tracking": tracking, "num_gallery": 2, "diagnose": True}
    config = EvaluateConfig(str(tiny_data), str(folder / "report"), **options)
    with redirect_stdout(printed):
        evaluation = evaluate(config)
    return Evaluated(config, evaluation, printed.getvalue())


@pytest.fixture
def config(evaluated: Evaluated, tmp_path: Path) -> EvaluateConfig:
    """Another evaluation, which MLflow records beside it."""
    return replace(evaluated.config, out=str(tmp_path / "report"), ablation=FULL, num_gallery=0, diagnose=False)


def records_of(data: str, ablation: Ablation) -> list[ImageRecord]:
    """What actors must come to."""
    dataset = PreparedDataset(data)
    return records_alone(InstanceNetwork(ModelConfig(), dataset.num_labels), dataset, ablation)


def interfered(data: Path, order: Path) -> PreparedDataset:
    """The data set, but who is about to read image 3 does what a file says: fail, or die, if only once."""

    class Interfered(PreparedDataset):  # in a function, so that Ray sends it to its workers with its code
        def __getitem__(self, index: int) -> Sample:
            if index == 3 and order.exists():
                ordered = order.read_text()
                if ordered == "fail":
                    raise ValueError("bad pixels")
                if ordered == "die once":
                    order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    return Interfered(str(data))


def test_deaths_change_nothing_until_they_are_too_many_and_a_bad_image_is_named(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "MAX_RESTARTS", 1)
    order = tmp_path / "order"
    dataset = interfered(tiny_data, order)
    network = InstanceNetwork(ModelConfig(), dataset.num_labels)
    with Evaluators(dataset, network, EvaluatorPlan("cpu", 2, 0.0)) as evaluators:
        order.write_text("die once")
        records = evaluators.records(FULL)
        assert not order.exists()
        order.write_text("fail")
        with pytest.raises(ValueError, match=r"^image_3: bad pixels$"):
            evaluators.records(FULL)
        order.write_text("die")
        with pytest.raises(JobError, match="an evaluator died: "):
            evaluators.records(FULL)
    expected = records_of(str(tiny_data), FULL)
    assert [record.image_id for record in records] == sorted(dataset.image_ids)
    assert sum(record.iou.size for record in expected) > 0
    np.testing.assert_equal([vars(record) for record in records], [vars(record) for record in expected])


def runs_of(config: EvaluateConfig) -> dict:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=resolve_uri(config.tracking))
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def in_json(evaluation: Evaluation) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in evaluation.metrics().items()}


def test_evaluate_reports_and_records(evaluated: Evaluated) -> None:
    config, evaluation, printed = evaluated
    out = Path(config.out)
    results = json.loads((out / "results.json").read_text())
    assert results["num_images"] == evaluation.num_images == len(PreparedDataset(config.data))
    assert results["metrics"] == pytest.approx(in_json(evaluation))
    assert results["config"]["model"]["semantic_crf"]["num_iterations"] == 5
    assert (results["config"]["device"], results["config"]["num_actors"]) == ("cpu", 2)
    assert (out / "per_class.csv").read_text().startswith("class,num_instances,ap_r_0.1")
    page = (out / "report.html").read_text()
    assert page.count("<article") == 2
    assert all(f'id="{name}"' in page for name in ("scores", "limits", "thresholds", "classes", "confusion", "images"))
    assert check_ending(printed)[1][0].results == (config.out, "FOLDER")
    assert "evaluating 7 images with 2 actors on CPUs; the cluster has 2 CPUs and 0 GPUs on 1 node" in printed
    assert "mlflow ui --backend-store-uri" in printed
    run = runs_of(config)["report"]
    assert run.info.status == "FINISHED"
    assert run.data.params["device"] == "cpu"
    assert run.data.metrics["authors/ap_r_vol"] == pytest.approx(evaluation.metrics()["authors/ap_r_vol"])
    artifacts = {path.name for path in (out.parent / "mlartifacts").rglob("*") if path.parent.name == "artifacts"}
    assert artifacts == {
        *("results.json", "per_class.csv", "records.arrow", "report.html", "diagnosis.json", "classes.json"),
        *("panel.png", "images"),
    }


def test_the_records_are_those_of_the_ablation(evaluated: Evaluated) -> None:
    config, evaluation, _ = evaluated
    records, expected = read_records(Path(config.out) / "records.arrow"), records_of(config.data, ABLATION)
    np.testing.assert_equal([vars(record) for record in records], [vars(record) for record in expected])
    np.testing.assert_equal(Evaluation.of(records, evaluation.classes).metrics(), evaluation.metrics())
    detections = [sample.detections for sample in PreparedDataset(config.data)]
    assert [len(record.validity) for record in records] == [len(found) for found in detections]
    assert any((record.validity != record.detection_scores).any() for record in records)
    assert any(record.matched.any() for record in records)


def test_a_diagnosis_is_printed_written_and_recorded(evaluated: Evaluated) -> None:
    config, evaluation, printed = evaluated
    out = Path(config.out)
    assert f"{summary(evaluation)}\n\nreplaced by the truth: AP^r" in printed
    assert "diagnosis 1 of 6: true semantic map\n" in printed
    metrics = json.loads((out / "diagnosis.json").read_text())["metrics"]
    assert metrics["as_it_is/ap_r_vol"] == pytest.approx(evaluation.metrics()["ap_r_vol"])
    assert metrics["true_map/mean_iou_after"] > evaluation.metrics()["mean_iou_after"] + 10
    assert metrics["true_map_and_detections/ap_r_vol"] > 99
    logged = {name: value for name, value in runs_of(config)["report"].data.metrics.items() if "diagnosis/" in name}
    assert logged == pytest.approx({f"diagnosis/{name}": value for name, value in metrics.items()})


def test_a_true_map_reaches_the_crf_of_a_semantic_network(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no use for the data's logits, so the truth must come in behind it."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # an actor, in the tests' own process
    dataset = PreparedDataset(str(tiny_data))
    model = ModelConfig(semantic="lraspp_mobilenet_v3_large")
    state = {name: tensor.numpy() for name, tensor in InstanceNetwork(model, dataset.num_labels).state_dict().items()}
    actor = actors._Evaluator(dataset, model, "cpu")
    records = [actor.record(index, state, FULL, true_map)[0] for index in range(len(dataset))]
    assert mean_iou(total((record.confusion_before for record in records), dataset.num_labels)) == 1.0


@pytest.mark.usefixtures("without_shape_checks")  # which take longer than the bootstrap
def test_ablate_puts_the_rows_side_by_side(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ablate(AblateConfig(config.data, config.out, tracking=config.tracking, num_actors=1, num_gallery=1))
    assert list(rows) == [row.name for row in ROWS]
    for row in ROWS:
        expected = Evaluation.of(records_of(config.data, row.ablation), rows[row.name].classes)
        assert rows[row.name].metrics() == pytest.approx(expected.metrics(), rel=0, abs=0, nan_ok=True)
    out = Path(config.out)
    table = (out / "ablation.md").read_text().splitlines()
    assert len(table) == 2 + len(ROWS) + 1 + 2 + len(ROWS) - 1
    assert "| 53.1 | 75.3 |" in table[1 + len(ROWS)]
    page = (out / "report.html").read_text()
    assert page.count("<article") == 1
    assert "paper: 3 full" in page
    printed = capsys.readouterr().out
    assert check_ending(printed)[0] == [out / "report.html", out / "ablation.md"]
    assert "full - row (95 % interval, 2000 resamples of the images)" in printed
    written = json.loads((out / "ablation.json").read_text())
    assert written["full"] == pytest.approx(in_json(rows["full"]))
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
