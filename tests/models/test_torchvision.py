from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instseg.models.semantic import SemanticNetwork, build_semantic, normalize


def build(name: str) -> SemanticNetwork:
    network = build_semantic(name, 6)
    assert network is not None
    return network


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_logits_have_the_size_of_the_image(name: str) -> None:
    network = build(name).train()
    logits = network(torch.rand(3, 47, 61) * 255)
    assert logits.shape == (6, 47, 61)
    logits.square().mean().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not without


def test_batch_normalisation_keeps_its_statistics() -> None:
    network = build("lraspp_mobilenet_v3_large").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(torch.rand(3, 40, 40) * 255)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert any(module.training for module in network.modules() if isinstance(module, nn.Dropout | nn.ReLU))


def test_normalisation_is_that_of_torchvision() -> None:
    from torchvision.transforms.v2 import functional

    image = torch.rand(3, 4, 5) * 255
    peer = functional.normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(image), peer)


@pytest.mark.parametrize(("name", "nearest"), [("fcn_resnet5", "fcn_resnet50"), ("fcn8", "fcn8s")])
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown network '{name}'; did you mean '{nearest}'"):
        build_semantic(name, 21)


def test_weights_must_fit() -> None:
    with pytest.raises(ValueError, match='expected "default"'):
        build_semantic("fcn_resnet50", 21, "some.safetensors")
    with pytest.raises(ValueError, match="has 21 labels, the data 6"):
        build_semantic("fcn_resnet50", 6, "default")


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(FileNotFoundError, match="could not download"):
        build_semantic("lraspp_mobilenet_v3_large", 21, "default")
