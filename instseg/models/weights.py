"""Weights that others trained: state dicts in files, or torchvision's own. No code in them is ever run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from instseg.checks import require
from instseg.storage import Place, StoragePath

DEFAULT = "default"  # in a file's place: what torchvision trained
_NUM_SHOWN = 3  # differences that an error names


def read_weights(path: Place) -> dict[str, Tensor]:
    """The tensors of a state dict, on the CPU.

    Args:
        path: What `torch.save` wrote where the name ends in .pth or .pt, else safetensors; a path or a URI.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds anything but tensors by name.
    """
    file = StoragePath.of(path)
    if file.size() is None:
        raise FileNotFoundError(f"weights {path}: no such file; expected a state dict, .safetensors or .pth")
    with file.on_disk() as local, _blamed(path):
        if not file.name.endswith((".pth", ".pt")):
            return load_file(local)
        tensors = torch.load(local, map_location="cpu", weights_only=True)
    return _checked(path, tensors)


def download_weights(url: str) -> dict[str, Tensor]:
    """A state dict of torchvision's, from torch's cache or else downloaded into it.

    Raises:
        FileNotFoundError: If it is not there and cannot be downloaded; says where to put it.
        ValueError: If it is damaged.
    """
    cached = f"{torch.hub.get_dir()}/checkpoints/{PurePosixPath(urlsplit(url).path).name}"
    try:
        with _blamed(cached):
            tensors = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except OSError as error:
        raise FileNotFoundError(f"weights: could not download {url} ({error}); put that file at {cached}") from error
    return _checked(cached, tensors)


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], otherwise: str) -> None:
    """Take over a state dict, as older versions of torchvision named its tensors too.

    Args:
        network: Of no use after an error, as some tensors may be those of the state dict.
        tensors: All of its tensors, of any floating-point dtype.
        otherwise: The beginning of the error.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape, naming the first few.
    """
    try:
        missing, unknown = network.load_state_dict(tensors, strict=False)
        problems = [f"{name} is missing" for name in missing]
        problems += [f"{name} is not part of the network" for name in unknown]
    except RuntimeError as error:  # one line for each tensor of another shape
        problems = str(error).split("\n\t")[1:]
    if problems:
        raise ValueError(f"{otherwise}: {'; '.join(problems[:_NUM_SHOWN])}; {len(problems)} differences in all")


def _checked(path: Place, tensors: object) -> dict[str, Tensor]:
    expected = "a dict of tensors by name, as network.state_dict() is"
    require(isinstance(tensors, dict), f"weights {path}", expected, f"a {type(tensors).__name__}")
    assert isinstance(tensors, dict)  # for type checkers
    for name, value in tensors.items():
        fits = isinstance(name, str) and isinstance(value, Tensor)
        require(fits, f"weights {path}", expected, f"one with {name!r}, a {type(value).__name__}")
    return dict(tensors)


@contextmanager
def _blamed(path: Place) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # arbitrary bytes raise nearly anything
        reason = re.split(r"\. |\n", str(error))[0]  # what follows advises to run what it refused
        got = f"{type(error).__name__}: {reason}"
        raise ValueError(f"weights {path}: expected tensors by name and nothing else, got {got}") from None
