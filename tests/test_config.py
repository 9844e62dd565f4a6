"""Every configuration refuses a choice that does not exist and a number that is none."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from instseg import config
from instseg.config import InstanceCrfConfig, KernelConfig, ModelConfig, PrepareConfig, SemanticCrfConfig, TrainConfig
from instseg.crf import HigherOrderCRF, InstanceCRF

CONFIGS = [c for c in vars(config).values() if isinstance(c, type) and is_dataclass(c)]
FIELDS = [(kind, field.name, get_type_hints(kind)[field.name]) for kind in CONFIGS for field in fields(kind)]
CHOICES = [(kind, name) for kind, name, hint in FIELDS if get_origin(hint) is Literal]
FLOATS = [(kind, name) for kind, name, hint in FIELDS if hint is float]
INTEGERS = [(kind, name) for kind, name, hint in FIELDS if hint in (int, int | None)]


def build(kind: type, **values: Any) -> Any:
    required: dict[str, Any] = dict.fromkeys(("devkit", "split", "data", "out"), "-") | {"results": ("-",)}
    given = {field.name: required[field.name] for field in fields(kind) if field.name in required}
    return kind(**given | values)


def test_the_fields_are_found():
    assert {name for _, name in CHOICES} >= {
        "normalization", "accuracy", "background", "score", "detection_form", "validity_unary",
        "learning_rate_schedule", "instance_loss",
    }  # fmt: skip
    assert len(FLOATS) > 10
    assert len(INTEGERS) > 10


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_a_choice_that_does_not_exist_is_refused(kind, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of .*, got 'nonesuch'; did you mean"):
        build(kind, **{name: "nonesuch"})


def test_the_nearest_choice_is_suggested():
    with pytest.raises(ValueError, match=r"normalization: .* got 'symetric'; did you mean 'symmetric'\?"):
        KernelConfig(normalization="symetric")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"accuracy: .* got 'exakt'; did you mean 'exact'\?"):
        KernelConfig(accuracy="exakt")  # pyright: ignore[reportArgumentType]


def test_a_choice_of_numbers_is_refused_as_one_of_words_is():
    with pytest.raises(ValueError, match=r"^fcn_stride: expected one of 8, 16, 32, got 61; did you mean 16\?"):
        ModelConfig(fcn_stride=61)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize(("kind", "name"), FLOATS)
def test_a_number_that_is_none_is_refused(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a finite number, got"):
        build(kind, **{name: value})


@pytest.mark.parametrize("value", [1.5, math.nan, "1", True])
@pytest.mark.parametrize(("kind", "name"), INTEGERS)
def test_a_count_that_is_no_integer_is_refused(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer, got"):
        build(kind, **{name: value})


@pytest.mark.parametrize("kind", [SemanticCrfConfig, InstanceCrfConfig])
def test_negative_iterations_are_refused(kind):
    with pytest.raises(ValueError, match="num_iterations: expected a value >= 0, got -3"):
        kind(num_iterations=-3)


def test_a_fold_that_does_not_exist_is_refused():
    assert TrainConfig("data", "out", held_out=2, num_folds=3).held_out == 2
    for fold in (-1, 3):
        with pytest.raises(ValueError, match=f"held_out: expected 0 to 2, got {fold}"):
            TrainConfig("data", "out", held_out=fold, num_folds=3)


@pytest.mark.parametrize(("given", "expected"), [(4, (4, 4)), ("4", (4, 4)), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers_are_a_number_or_a_range(given, expected):
    assert TrainConfig("data", "out", num_workers=given).worker_range == expected


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "", "2:", "2-8", "0:2", "8:2", "1:2:3"])
def test_other_workers_are_refused(given):
    with pytest.raises(ValueError, match=r"num_workers: expected .*, such as|num_workers: expected 1 or more, as in"):
        TrainConfig("data", "out", num_workers=given)


def test_epochs_of_the_detection_head_alone_need_one():
    model = ModelConfig(detection_head=True)
    assert TrainConfig("data", "out", model=model, num_epochs=3, num_head_epochs=2).num_head_epochs == 2
    with pytest.raises(ValueError, match=r"num_head_epochs: expected 0 without model\.detection_head, got 2"):
        TrainConfig("data", "out", num_epochs=3, num_head_epochs=2)
    with pytest.raises(ValueError, match="num_head_epochs: expected a value >= 0, got -1"):
        TrainConfig("data", "out", model=model, num_head_epochs=-1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": "voc"}, r"^classes: expected none with --sbd, which has VOC's, got voc"),
        ({"min_pixels": 200}, r"^min_pixels: expected 0 without --coco, got 200"),
    ],
)
@pytest.mark.parametrize("devkit", [None, "devkit"])
def test_an_option_of_another_data_set_is_refused(given, message, devkit):
    with pytest.raises(ValueError, match=message):
        PrepareConfig("out", devkit=devkit, sbd="sbd", split="train", **given)


def test_whole_numbers_are_weights_too():
    weights = dict.fromkeys(("spatial_weight", "bilateral_weight", "detection_weight_x", "detection_weight_y"), 8)
    crf = HigherOrderCRF(3, SemanticCrfConfig(**weights))
    assert {parameter.dtype for parameter in crf.parameters()} == {torch.float32}
    assert InstanceCRF(InstanceCrfConfig(spatial_weight=2)).spatial_weight.item() == 2.0
    assert type(build(KernelConfig, theta_beta=np.float32(3)).theta_beta) is float  # JSON and equality know no other


def test_a_truth_value_is_one():
    with pytest.raises(ValueError, match="validity: expected True or False, got 'no'"):
        config.Ablation(validity="no")  # pyright: ignore[reportArgumentType]


def test_defaults_pass_their_own_checks():
    for kind in CONFIGS:
        assert build(kind) == build(kind)
    assert asdict(TrainConfig("data", "out"))["model"] == asdict(ModelConfig())
