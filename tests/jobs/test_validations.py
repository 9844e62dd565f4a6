from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instseg.config import FULL, ModelConfig, ValidationConfig
from instseg.jobs.evaluators import _Evaluator
from instseg.jobs.validate import METRICS, crf_parameters, validate, validation_images
from instseg.jobs.validations import BEST, PICTURES, VALIDATIONS, best, catch_up, due, kept, records, stopped
from instseg.models.checkpoint import epoch_folder, find_checkpoint, save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.report.tables import Evaluation
from instseg.storage import StoragePath

MODEL = ModelConfig()
CLASSES = ["background", "square", "circle", "cross"]


def save(run: Path, epoch: int, classes: list[str] = CLASSES) -> InstanceNetwork:
    torch.manual_seed(epoch)
    network = InstanceNetwork(MODEL, len(classes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    config = {"model": asdict(MODEL), "num_labels": len(classes), "classes": classes}
    save_checkpoint(epoch_folder(run, epoch), network.state_dict(), config, state={"epoch": epoch, "step": 10 * epoch})
    return network


@pytest.fixture
def config(tiny_data: Path) -> ValidationConfig:
    return ValidationConfig(data=str(tiny_data), num_panels=2)


def test_it_measures_what_an_evaluation_does(tmp_path: Path, config: ValidationConfig) -> None:
    network, dataset = save(tmp_path, 1), validation_images(config)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    evaluator = _Evaluator(dataset, MODEL, "cpu")
    expected = Evaluation.of(
        [evaluator.record(i, state, FULL)[0] for i in range(len(dataset))], dataset.classes
    ).metrics()
    found = validate(epoch_folder(tmp_path, 1), config, tmp_path / "panels.png", tmp_path / "crf.png")
    assert found == {name: expected[source] for name, source in METRICS.items()}
    assert 0 < found["ap_r_vol"] < 100
    for name in ("panels", "crf"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 1000


def test_the_same_images_every_time_spread_over_all(config: ValidationConfig) -> None:
    every = validation_images(config).image_ids
    assert validation_images(replace(config, num_images=3)).image_ids == (every[0], every[2], every[4])
    assert validation_images(replace(config, num_images=99)).image_ids == every


def test_parameters_are_compared_with_those_that_training_started_from(tmp_path: Path) -> None:
    network = save(tmp_path, 1)
    now, initial = crf_parameters(find_checkpoint(tmp_path), network)
    np.testing.assert_array_equal(now.compatibility, network.semantic_crf.dense.compatibility.detach())
    np.testing.assert_array_equal(initial.compatibility, 1 - np.eye(4))
    assert initial.detection_weight_x.tolist() == [MODEL.semantic_crf.detection_weight_x] * 4
    assert initial.instance_weights == (MODEL.instance_crf.spatial_weight, MODEL.instance_crf.bilateral_weight)


def test_each_checkpoint_that_is_due_is_validated_once(tmp_path: Path, config: ValidationConfig) -> None:
    config = replace(config, every=20)
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    (epoch_folder(tmp_path, 4) / "model.safetensors").publish(b"its writer was killed")
    assert [record["checkpoint"] for record in catch_up(tmp_path, config)] == ["epoch_0002"]
    assert list(catch_up(tmp_path, config)) == []
    for epoch in (4, 5):
        save(tmp_path, epoch)
    assert [record["checkpoint"] for record in catch_up(tmp_path, config)] == ["epoch_0004"]
    assert [(record["checkpoint"], record["step"]) for record in records(tmp_path)] == [
        ("epoch_0002", 20),
        ("epoch_0004", 40),
    ]
    for picture in PICTURES:
        assert (tmp_path / VALIDATIONS / f"epoch_0004_{picture}.png").is_file()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("written", range(4))
def test_whoever_is_killed_leaves_the_same_in_the_end(
    tmp_path: Path, config: ValidationConfig, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Killed before any of its four files: panels, parameters, the best, the record."""
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 1)
    (expected,) = catch_up(tmp_path / "a", config)
    real, calls = StoragePath.publish, []

    def killed(self: StoragePath, content: bytes) -> None:
        calls.append(self.name)
        if len(calls) > written:
            raise Killed
        real(self, content)

    monkeypatch.setattr(StoragePath, "publish", killed)
    with pytest.raises(Killed):
        list(catch_up(tmp_path / "b", config))
    monkeypatch.undo()
    assert due(tmp_path / "b", config) == {"epoch_0001": 10}
    (found,) = catch_up(tmp_path / "b", config)
    assert found["metrics"] == expected["metrics"]
    assert (tmp_path / "b" / BEST).read_text() == (tmp_path / "a" / BEST).read_text()
    assert due(tmp_path / "b", config) == {}


def test_a_checkpoint_that_does_not_fit_is_recorded_and_not_tried_again(
    tmp_path: Path, config: ValidationConfig
) -> None:
    save(tmp_path, 1, ["background", "square", "circle", "star"])
    (record,) = catch_up(tmp_path, config)
    assert "trained with class 3 = 'star'" in record["error"]
    assert due(tmp_path, config) == {}
    assert not (tmp_path / BEST).exists()
    assert not stopped(tmp_path, replace(config, patience=1))


def write_records(run: Path, scores: Iterable[float]) -> None:
    (run / VALIDATIONS).mkdir()
    for number, score in enumerate(scores, 1):
        metrics = {} if math.isnan(score) else {"ap_r_vol": score, "mean_iou": -score}
        record = {"checkpoint": f"epoch_{number:04d}", "step": 10 * number, "metrics": metrics}
        (run / VALIDATIONS / f"epoch_{number:04d}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("scores", "winner", "since"),
    [([1, 3, 2], 2, 1), ([3, 3, 3], 1, 2), ([1, 2, 3], 3, 0), ([math.nan, 1, math.nan], 2, 1), ([math.nan], None, 0)],
)
def test_the_best_and_when_to_stop(
    tmp_path: Path, config: ValidationConfig, scores: list[float], winner: int | None, since: int
) -> None:
    write_records(tmp_path, scores)
    found = best(records(tmp_path), "ap_r_vol")
    assert (found and found["step"]) == (winner and 10 * winner)
    for patience in range(1, 5):
        assert stopped(tmp_path, replace(config, patience=patience)) == (since >= patience)
    assert not stopped(tmp_path, config)


def test_the_best_is_of_the_metric_that_was_chosen(tmp_path: Path) -> None:
    write_records(tmp_path, [1, 3, 2])
    found = best(records(tmp_path), "mean_iou")
    assert found is not None
    assert found["step"] == 10


def test_what_may_not_be_deleted(tmp_path: Path, config: ValidationConfig) -> None:
    """The best, and what waits: not what was found worse, and not what is not due."""
    write_records(tmp_path, [1, 3, 2])
    for epoch in range(1, 7):
        save(tmp_path, epoch)
    config = replace(config, every=20)
    assert kept(tmp_path, config) == {"epoch_0002", "epoch_0005"}
    assert kept(tmp_path, replace(config, data=None)) == {"epoch_0002"}


def test_no_data_and_empty_data_are_named(
    tmp_path: Path, write_data: Callable[[Path, Iterable[int]], Path], config: ValidationConfig
) -> None:
    with pytest.raises(ValueError, match=r"validation\.data: expected a directory that prepare\.py wrote, got None"):
        validation_images(ValidationConfig())
    with pytest.raises(FileNotFoundError, match=r"run workflows/prepare\.py first"):
        validation_images(replace(config, data=str(tmp_path)))
    with pytest.raises(ValueError, match="has no images"):
        validation_images(replace(config, data=str(write_data(tmp_path, []))))
