from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import vgg16

from instseg.models.fcn8s import FCN8s, bilinear_kernel
from instseg.models.semantic import build_semantic


@pytest.fixture(scope="module")
def network() -> FCN8s:
    """One network for the whole file: its 134 million parameters take a second to draw."""
    torch.manual_seed(0)
    return FCN8s(5)


@pytest.mark.parametrize("size", [(1, 1), (33, 57)])
def test_output_has_the_size_of_the_image_and_starts_at_zero(network: FCN8s, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = network(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.abs().max() == 0


def test_trunk_is_that_of_torchvision(network: FCN8s) -> None:
    with torch.device("meta"):  # the classifier would take a second to initialise
        peer = vgg16().features
    assert isinstance(peer, nn.Sequential)
    peer.load_state_dict(network.features.state_dict(), assign=True)
    for layer in peer:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    first = peer[0]
    assert isinstance(first, nn.Conv2d)
    first.padding = (100, 100)
    images = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        torch.testing.assert_close(network.features(images), peer(images), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [2, 8])
def test_bilinear_kernel_reproduces_linear_functions(factor: int) -> None:
    kernel = bilinear_kernel(factor)
    assert kernel.sum().item() == factor**2
    ramp = torch.arange(7.0).expand(1, 1, 7, 7)
    upsampled = F.conv_transpose2d(ramp, kernel[None, None], stride=factor)[0, 0, 2 * factor, factor:-factor]
    expected = (torch.arange(6 * factor) + 0.5) / factor
    torch.testing.assert_close(upsampled, expected)


def test_crops_align_scores_with_pixels(network: FCN8s) -> None:
    """A score that depends on one cell of pool3 must come out centred on the pixels that this cell sees."""
    with torch.no_grad():
        nn.init.constant_(network.score_pool3.weight, 1)
        image = torch.zeros(1, 3, 97, 97)
        image[..., 48, 48] = 10
        response = (network(image) - network(torch.zeros_like(image)))[0, 0].abs()
        nn.init.zeros_(network.score_pool3.weight)
    rows, columns = torch.meshgrid(torch.arange(97.0), torch.arange(97.0), indexing="ij")
    center = [(axis * response).sum() / response.sum() for axis in (rows, columns)]
    np.testing.assert_allclose(center, 48, atol=4)  # half a stride of pool3


def test_gradient_reaches_the_first_convolution(network: FCN8s) -> None:
    for score in (network.score_fr, network.score_pool4, network.score_pool3):
        nn.init.normal_(score.weight, std=0.01)
    network(torch.randn(1, 3, 20, 20)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    network.zero_grad(set_to_none=True)
    for score in (network.score_fr, network.score_pool4, network.score_pool3):
        nn.init.zeros_(score.weight)


def test_fully_connected_layers_become_convolutions(network: FCN8s, tmp_path: Path) -> None:
    features = {f"features.{name}": tensor.clone() for name, tensor in network.features.state_dict().items()}
    plane = torch.randn(4096, 1).expand(4096, 512 * 49).contiguous().half()
    square = torch.randn(4096, 1).expand(4096, 4096).contiguous().half()
    bias = torch.randn(4096).half()
    connected = {"classifier.0.weight": plane, "classifier.0.bias": bias}
    connected |= {"classifier.3.weight": square, "classifier.3.bias": bias.clone()}
    save_file(features | connected, tmp_path / "vgg.safetensors")
    network.load_imagenet_weights(tmp_path / "vgg.safetensors")
    x = torch.randn(1, 512, 7, 7)
    with torch.no_grad():
        expected = F.linear(x.flatten(1), plane.float(), bias.float())
        torch.testing.assert_close(network.fc6(x).flatten(1), expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(network.fc7.weight.detach().flatten(1), square.float())


@pytest.mark.real_data
def test_imagenet_weights_load_in_half_precision(network: FCN8s, shared_data: Path) -> None:
    path = shared_data / "weights" / "vgg16_imagenet_features_fp16.safetensors"
    network.load_imagenet_weights(path)
    stored = load_file(path)
    torch.testing.assert_close(
        network.features.get_parameter("28.weight").detach(), stored["features.28.weight"].float()
    )


def test_unsuitable_weights_are_named(network: FCN8s, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: no such file"):
        network.load_imagenet_weights(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("not a tensor in sight")
    with pytest.raises(ValueError, match="expected tensors by name and nothing else, got SafetensorError"):
        network.load_imagenet_weights(tmp_path / "text")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "short")
    with pytest.raises(ValueError, match=r"no tensor 'features.0.bias'"):
        network.load_imagenet_weights(tmp_path / "short")
    save_file({"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"expected \(64, 3, 3, 3\), got \(64, 3, 5, 5\)"):
        network.load_imagenet_weights(tmp_path / "wide")


def test_precomputed_logits_need_no_network() -> None:
    assert build_semantic("logits", 21) is None
    with pytest.raises(ValueError, match="semantic_weights"):
        build_semantic("logits", 21, "weights.safetensors")
