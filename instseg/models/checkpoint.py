"""Checkpoints: folders of safetensors and JSON that are complete once their manifest of hashes is there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instseg.data.files import sha256_of

_Config = TypeVar("_Config")
FOLDER = "checkpoints"  # inside the run directory
# Fields of `ModelConfig` that training starts from. A checkpoint has trained weights in their place.
INITIAL_WEIGHTS = (
    "semantic_weights",
    "semantic_crf.spatial_weight",
    "semantic_crf.bilateral_weight",
    "semantic_crf.detection_weight_x",
    "semantic_crf.detection_weight_y",
    "instance_crf.spatial_weight",
    "instance_crf.bilateral_weight",
)
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_CONFIG, _STATE, _MANIFEST = "config.json", "state.json", "manifest.json"
_PARTIAL = ".partial"  # suffix of a folder that is being written

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Where it lies.
        config: What the network was built from and trained with: at least "model" and "num_labels", and "classes"
            where it was trained on a prepared data set.
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
    """Write a checkpoint; a process killed at any moment leaves either all of it or nothing under its name.

    Raises:
        OSError: If it cannot be written, e.g. because the disk is full.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_tensors(partial / _MODEL, model)
    _write_tensors(partial / _OPTIMIZER, optimizer or {})
    _write_json(partial / _CONFIG, config)
    _write_json(partial / _STATE, state or {})
    _write_json(partial / _MANIFEST, {name: sha256_of(partial / name) for name in _files(partial)})
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, instead of which training went on from an older one
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
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise ValueError(f"checkpoint {folder}: {name} is damaged or missing; use another checkpoint")
    return Checkpoint(folder, _read_json(folder / _CONFIG), _read_json(folder / _STATE))


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint of a run directory, if there is one; warns of newer ones."""
    for folder in sorted((run / FOLDER).glob("epoch_*"), reverse=True):
        if folder.suffix == _PARTIAL:
            continue
        try:
            return read_checkpoint(folder)
        except (FileNotFoundError, ValueError) as error:
            log.warning("%s. It is passed over for the one before it, if there is one", error)
    return None


def check_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> None:
    """Raise ValueError unless a checkpoint that says what it was trained on says `classes`, in this order."""
    trained = checkpoint.config.get("classes", classes)
    if len(trained) != len(classes):
        raise ValueError(f"checkpoint {checkpoint.folder}: has {len(trained)} labels, the data has {len(classes)}")
    for label, (before, now) in enumerate(zip(trained, classes, strict=True)):
        if before != now:
            raise ValueError(
                f"checkpoint {checkpoint.folder}: was trained with class {label} = {before!r}, in the data it is "
                f"{now!r}; prepare the data with the same classes in the same order"
            )


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


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # all that it says of a full disk
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"checkpoint {path.parent}: {path.name} is damaged ({error})") from None
