"""Checkpoints: folders of safetensors and JSON that are complete once their manifest of hashes is there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from safetensors.torch import load_file, save_file
from torch import Tensor

_Config = TypeVar("_Config")
FOLDER = "checkpoints"  # inside the run directory
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_CONFIG, _STATE, _MANIFEST = "config.json", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Where it lies.
        config: What the network was built from and trained with: at least "model" and "num_labels".
        state: Counters of the training loop: at least "epoch", the number of finished epochs.
    """

    folder: Path
    config: dict[str, Any]
    state: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        """The network's state dict."""
        return load_file(self.folder / _MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, "<parameter>.<quantity>"."""
        return load_file(self.folder / _OPTIMIZER)


def save_checkpoint(
    folder: Path,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint; a process killed at any moment leaves either all of it or nothing under its name."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(model), partial / _MODEL)
    save_file(_contiguous(optimizer or {}), partial / _OPTIMIZER)
    _write_json(partial / _CONFIG, config)
    _write_json(partial / _STATE, state or {})
    _write_json(partial / _MANIFEST, {name: _sha256(partial / name) for name in _files(partial)})
    shutil.rmtree(folder, ignore_errors=True)  # damaged: training went on from the one before, and is here again
    partial.rename(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        FileNotFoundError: If it has no manifest, that is, was not finished.
        ValueError: If a file is not what the manifest says.
    """
    if not (folder / _MANIFEST).is_file():
        raise FileNotFoundError(f"checkpoint {folder}: no {_MANIFEST} in it; it is incomplete, or no checkpoint")
    for name, digest in _read_json(folder / _MANIFEST).items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ValueError(f"checkpoint {folder}: {name} is damaged or missing; use another checkpoint")
    return Checkpoint(folder, _read_json(folder / _CONFIG), _read_json(folder / _STATE))


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint of a run directory, if there is one."""
    for folder in sorted((run / FOLDER).glob("epoch_*"), reverse=True):
        try:
            return read_checkpoint(folder)
        except (FileNotFoundError, ValueError):
            continue  # torn by a crash: the one before it counts
    return None


def epoch_folder(run: Path, epoch: int) -> Path:
    """Where the checkpoint after `epoch` epochs lies."""
    return run / FOLDER / f"epoch_{epoch:04d}"


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the latest one of the run directory `path`.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If the checkpoint at `path` is damaged.
    """
    if (path / _MANIFEST).is_file():
        return read_checkpoint(path)
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(f"checkpoint {path}: no complete checkpoint there; run workflows/train.py first")
    return checkpoint


def from_json(kind: type[_Config], values: Mapping[str, Any]) -> _Config:
    """The (nested) configuration dataclass that `dataclasses.asdict` and JSON made `values` of.

    Raises:
        ValueError: If there is a value that the dataclass does not know.
    """
    hints = get_type_hints(kind)
    unknown = values.keys() - {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown {sorted(unknown)[0]!r}; written by another version?")
    nested = {
        name: from_json(hints[name], value) if is_dataclass(hints[name]) else value for name, value in values.items()
    }
    return kind(**nested)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
