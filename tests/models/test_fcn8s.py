from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import vgg16

from instseg.models import fcn8s
from instseg.models.fcn8s import FCN8s, bilinear_kernel
from instseg.models.semantic import build_semantic


@pytest.fixture(scope="module")
def network() -> FCN8s:
    """One network for the whole file: its 134 million parameters take a second to draw."""
    torch.manual_seed(0)
    return FCN8s(5)


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of two channels a layer, which take no time."""
    monkeypatch.setattr(fcn8s, "_STAGES", tuple((2,) * len(stage) for stage in fcn8s._STAGES))


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


SIZES = {  # rows and columns for an image of 500 x 500, as the authors' networks have them
    "features.0": 698, "features.4": 349, "features.9": 175, "features.16": 88, "features.23": 44, "features.30": 22,
    "fc6": 16, "fc7": 16, "score_fr": 16, "score_pool4": 44, "score_pool3": 88,
}  # fmt: skip


@pytest.mark.parametrize(("stride", "upsampled"), [(32, [544]), (16, [34, 560]), (8, [34, 70, 568])])
def test_sizes_are_those_of_the_authors_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, stride: int, upsampled: list[int]
) -> None:
    sizes: dict[str, tuple[int, ...]] = {}
    deconvolved = []
    real = F.conv_transpose2d

    def deconvolve(*args: Any, **options: Any) -> torch.Tensor:
        deconvolved.append(tuple((result := real(*args, **options)).shape[-2:]))
        return result

    monkeypatch.setattr(F, "conv_transpose2d", deconvolve)
    with torch.device("meta"):  # shapes alone
        network = FCN8s(21, stride=stride)
        for name, module in network.named_modules():
            module.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: tuple(out.shape[-2:])}))
        logits = network(torch.zeros(1, 3, 500, 500))
    assert logits.shape == (1, 21, 500, 500)
    scores = {32: {"score_pool4", "score_pool3"}, 16: {"score_pool3"}, 8: set()}[stride]
    for name in SIZES.keys() - scores:
        assert sizes[name] == (SIZES[name], SIZES[name]), name
    assert deconvolved == [(size, size) for size in upsampled]


STREAMS = [(32, "score_fr"), (16, "score_fr"), (16, "score_pool4")]
STREAMS += [(8, name) for name in ("score_fr", "score_pool4", "score_pool3")]


@pytest.mark.parametrize("padding", [100, 1])
@pytest.mark.parametrize(("stride", "stream"), STREAMS)
def test_every_stream_comes_out_on_the_pixels_that_it_sees(thin: None, stride: int, stream: str, padding: int) -> None:
    """Coordinates that go in as colours come out as scores, whichever pools they went through.

    Convolutions pass on the middle of their window, and pools average: a cell then has the coordinates of the centre
    of what it sees, and bilinear interpolation reproduces them at each pixel if the crops are right.
    """
    network = FCN8s(2, width=2, stride=stride, padding=padding).eval()
    others = {f"score_{name}" for name in ("fr", "pool4", "pool3")} - {stream}
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.weight)
                middle = layer.kernel_size[0] // 2
                layer.weight[0, 0, middle, middle] = layer.weight[1, 1, middle, middle] = name not in others
        for index, layer in enumerate(network.features):
            if isinstance(layer, nn.MaxPool2d):
                network.features[index] = nn.AvgPool2d(2, 2, ceil_mode=True)
        rows, columns = torch.meshgrid(torch.arange(160.0), torch.arange(192.0), indexing="ij")
        (scores,) = network(torch.stack([rows, columns, rows])[None])
    inside = slice(70, -70)  # nearer to the border are pixels of cells that see what is beyond it
    torch.testing.assert_close(scores[0, inside, inside], rows[inside, inside], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scores[1, inside, inside], columns[inside, inside], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [(32, 16), (16, 8)])
def test_a_finer_network_starts_with_the_predictions_of_the_coarser(thin: None, before: int, after: int) -> None:
    torch.manual_seed(0)
    coarse, fine = FCN8s(3, width=4, stride=before).eval(), FCN8s(3, width=4, stride=after).eval()
    for name, parameter in coarse.named_parameters():
        if name.startswith("score"):
            nn.init.normal_(parameter)
    missing, unknown = fine.load_state_dict(coarse.state_dict(), strict=False)
    assert not unknown
    added = {16: "score_pool4", 8: "score_pool3"}[after]
    assert set(missing) == {f"{added}.weight", f"{added}.bias"}
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        expected, got = coarse(image), fine(image)
    assert (got - expected).abs().mean() < 0.05 * (expected.max() - expected.min())  # in two steps, not one
    assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_stages_and_what_is_new_are_told_apart(network: FCN8s) -> None:
    counts = [len(list(network.stage_parameters(stages))) for stages in range(6)]
    assert counts == [0, 4, 8, 14, 20, 26]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert [names[id(p)] for p in network.stage_parameters(2)][::2] == [f"features.{i}.weight" for i in (0, 2, 5, 7)]
    for stages in (-1, 6):
        with pytest.raises(ValueError, match=f"^num_stages: expected 0 to 5, got {stages}"):
            network.stage_parameters(stages)
    scores = {f"{score}.{part}" for score in ("score_fr", "score_pool4", "score_pool3") for part in ("weight", "bias")}
    assert {names[id(parameter)] for parameter in network.new_parameters()} == scores
    narrow = build_semantic("fcn8s", 3, fcn_width=8, fcn_stride=32)
    assert narrow is not None
    names = {id(parameter): name for name, parameter in narrow.named_parameters()}
    layers = ("fc6", "fc7", "score_fr")
    new = {f"body.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert {names[id(parameter)] for parameter in narrow.new_parameters()} == new
    assert next(names[id(p)] for p in narrow.stage_parameters(1)) == "body.features.0.weight"


def test_gradient_reaches_the_first_convolution(network: FCN8s) -> None:
    scores = [network.get_parameter(f"score_{name}.weight") for name in ("fr", "pool4", "pool3")]
    for weight in scores:
        nn.init.normal_(weight, std=0.01)
    network(torch.randn(1, 3, 20, 20)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    network.zero_grad(set_to_none=True)
    for weight in scores:
        nn.init.zeros_(weight)


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
    narrow = FCN8s(2, width=8)  # another width has no place for them
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    narrow.load_imagenet_weights(tmp_path / "vgg.safetensors")
    for name, tensor in narrow.state_dict().items():
        taken = network.state_dict()[name] if name.startswith("features") else before[name]
        torch.testing.assert_close(tensor, taken, rtol=0, atol=0)


def test_the_default_is_what_torchvision_has_of_vgg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    donor = FCN8s(2, width=2)
    tensors = {f"features.{name}": tensor for name, tensor in donor.features.state_dict().items()}
    torch.save(tensors, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    network = build_semantic("fcn8s", 3, "default", fcn_width=4)
    assert network is not None
    features = network.body.get_submodule("features").state_dict()
    torch.testing.assert_close(features, donor.features.state_dict(), rtol=0, atol=0)


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(
        FileNotFoundError, match=r"could not download https://.*; put that file at .*/vgg16-397923af.pth"
    ):
        build_semantic("fcn8s", 3, "default", fcn_width=4)


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
