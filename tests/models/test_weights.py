from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from instseg.models.weights import download_weights, load_weights, read_weights

URL = "https://example.org/models/small-0123abcd.pth"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_state_dict_comes_back(tmp_path: Path, suffix: str) -> None:
    tensors = network().state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    torch.testing.assert_close(read_weights(path), dict(tensors), rtol=0, atol=0)
    torch.testing.assert_close(read_weights(path.as_uri()), dict(tensors), rtol=0, atol=0)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "weights.pth", tmp_path / "ran"
    for content in ({"a": Code(ran)}, {"a": torch.zeros(1), "b": [Code(ran)]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"weights.pth: expected tensors by name and nothing else, got Unpickling"):
            read_weights(path)
    path.write_bytes(pickle.dumps({"a": Code(ran)}, protocol=2))
    with pytest.raises(ValueError, match=r"weights.pth: expected tensors by name and nothing else, got Unpickling"):
        read_weights(path)
    assert not ran.exists()
    pickle.loads(path.read_bytes())  # noqa: S301  the code works, had it been let
    assert ran.exists()


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.zeros(1)], "got a list"),
        (torch.zeros(1), "got a Tensor"),
        ({"model": {"weight": torch.zeros(1)}}, "got one with 'model', a dict"),
        ({"weight": torch.zeros(1), "epoch": 3}, "got one with 'epoch', a int"),
        ({0: torch.zeros(1)}, "got one with 0, a Tensor"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object, got: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"expected a dict of tensors by name.*{got}"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"weights{suffix}"
    tensors = network().state_dict()
    save_file(tensors, whole) if suffix == ".safetensors" else torch.save(tensors, whole)
    content = whole.read_bytes()
    for damaged in (b"", b"not a tensor in sight", content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"weights{suffix}: expected tensors by name"):
            read_weights(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such file"):
        read_weights(tmp_path / "absent.pth")


def test_tensors_of_any_precision_are_taken_over() -> None:
    tensors = {name: tensor.half() for name, tensor in network().state_dict().items()}
    convolution = nn.Conv2d(3, 2, 1)
    load_weights(nn.Sequential(convolution, nn.BatchNorm2d(2)), tensors, "x")
    torch.testing.assert_close(convolution.weight.detach(), tensors["0.weight"].float(), rtol=0, atol=0)


def test_differences_are_named_and_counted() -> None:
    tensors = network().state_dict()
    with pytest.raises(ValueError, match=r"weights x: 0.bias is missing; 1 diff"):
        load_weights(network(), {k: v for k, v in tensors.items() if k != "0.bias"}, "weights x")
    with pytest.raises(ValueError, match=r"weights x: more is not part of the network; 1 diff"):
        load_weights(network(), tensors | {"more": torch.zeros(1)}, "weights x")
    with pytest.raises(ValueError, match=r"weights x: size mismatch for 0.bias: .*\[7\].*\[2\]"):
        load_weights(network(), tensors | {"0.bias": torch.zeros(7)}, "weights x")
    with pytest.raises(ValueError, match=r"x: 0.weight is missing; 0.bias is missing; 1.weight is missing; 6 diff"):
        load_weights(network(), {}, "x")


def test_a_damaged_file_in_the_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"a": Code(tmp_path / "ran")}, cache / "small-0123abcd.pth")
    with pytest.raises(ValueError, match=f"weights {cache}/small-0123abcd.pth: expected tensors by name"):
        download_weights(URL)
    assert not (tmp_path / "ran").exists()
