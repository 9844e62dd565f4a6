from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import get_model

from instseg.models.semantic import SemanticNetwork, build_semantic, normalize, weights_file
from instseg.storage import StoragePath


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


def test_its_parts_can_be_trained_at_rates_of_their_own() -> None:
    torch.manual_seed(0)
    network = build("lraspp_mobilenet_v3_large").train()
    logits = network(torch.rand(3, 40, 56) * 255)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    new = {names[id(parameter)] for parameter in network.new_parameters()}
    assert new == {name for name in names.values() if name.startswith("body.model.classifier.")}
    optimizer = torch.optim.SGD(network.new_parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert "body.model.classifier.low_classifier.bias" in moved
    assert moved <= new  # the gradient of some weights is below a float's resolution: they begin at random
    assert list(network.stage_parameters(0)) == []
    with pytest.raises(ValueError, match=r'^num_stages: expected 0 with any network but "fcn8s", got 2'):
        network.stage_parameters(2)


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
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such file"):
        build_semantic("lraspp_mobilenet_v3_large", 21, "absent.pth")
    with pytest.raises(ValueError, match="has 21 labels, the data 6"):
        build_semantic("fcn_resnet50", 6, "default")


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    file = "lraspp_mobilenet_v3_large-d234d4ea.pth"
    place = f"could not download https://.*/{file} .*; put that file at {tmp_path}/hub/checkpoints/{file}"
    with pytest.raises(FileNotFoundError, match=place):
        build_semantic("lraspp_mobilenet_v3_large", 21, "default")


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_coarse_logits_are_what_torchvision_upsamples(name: str) -> None:
    network = build(name).eval()
    image = torch.rand(3, 47, 61) * 255
    coarse = network.coarse_logits(image)
    assert coarse.dtype == torch.float32
    assert not coarse.requires_grad
    assert coarse.shape[0] == 6
    assert 47 * 61 // 512 <= coarse[0].numel() <= 47 * 61 // 32  # near a stride of 8
    upsampled = interpolate(coarse[None], size=(47, 61), mode="bilinear", align_corners=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(upsampled, network(image), rtol=0, atol=1e-5)
        peer = network.body.get_submodule("model")(normalize(image)[None])["out"][0]
        torch.testing.assert_close(network(image), peer, rtol=0, atol=0)


def test_coarse_logits_of_another_body_are_its_own_at_an_eighth() -> None:
    class Channels(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :2]

    network = SemanticNetwork(Channels())
    flat = torch.full((3, 33, 16), 100.0)
    coarse = network.coarse_logits(flat)
    assert coarse.shape == (2, 5, 2)
    torch.testing.assert_close(coarse, network(flat)[:, :5, :2])
    fine = torch.zeros(3, 64, 64)
    fine[:, :, ::2] = 255  # finer than the stride: averaged, not sampled
    middle = normalize(torch.full((3, 1, 1), 127.5))[:2]
    torch.testing.assert_close(network.coarse_logits(fine)[:, :, 1:-1], middle.expand(2, 8, 6), atol=0.02, rtol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_local_state_dict_is_taken_over(tmp_path: Path, suffix: str) -> None:
    donor = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=6)
    path = tmp_path / f"weights{suffix}"
    write(donor.state_dict(), path)
    network = build_semantic("lraspp_mobilenet_v3_large", 6, str(path))
    assert network is not None
    torch.testing.assert_close(network.body.get_submodule("model").state_dict(), donor.state_dict(), rtol=0, atol=0)


def test_the_auxiliary_classifier_of_a_state_dict_is_left_out(tmp_path: Path) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    donor = get_model(name, weights=None, weights_backbone=None, num_classes=6, aux_loss=True)
    assert any(key.startswith("aux_classifier.") for key in donor.state_dict())
    write(donor.state_dict(), tmp_path / "weights.pth")
    network = build_semantic(name, 6, str(tmp_path / "weights.pth"))
    assert network is not None
    image = torch.rand(3, 32, 40) * 255
    with torch.no_grad():
        peer = donor.eval()(normalize(image)[None])["out"][0]
        torch.testing.assert_close(network.eval()(image), peer, rtol=0, atol=0)


def test_a_state_dict_with_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    donor = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=6)
    write(donor.state_dict(), tmp_path / "weights.pth")
    expected = "do not fit lraspp_mobilenet_v3_large with 4 labels: size mismatch for classifier.low_classifier.weight"
    with pytest.raises(ValueError, match=expected):
        build_semantic("lraspp_mobilenet_v3_large", 4, str(tmp_path / "weights.pth"))


def test_the_default_weights_are_those_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    donor = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=21)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    write(donor.state_dict(), tmp_path / "hub" / "checkpoints" / "lraspp_mobilenet_v3_large-d234d4ea.pth")
    network = build_semantic("lraspp_mobilenet_v3_large", 21, "default")
    assert network is not None
    torch.testing.assert_close(network.body.get_submodule("model").state_dict(), donor.state_dict(), rtol=0, atol=0)


def test_the_file_of_weights_is_known_before_it_is_read() -> None:
    assert weights_file(None) is None
    assert weights_file("default") is None
    assert weights_file("a/b.pth") == StoragePath.of("a/b.pth")


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
