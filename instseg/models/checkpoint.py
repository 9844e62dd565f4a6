"""Checkpoints: folders of safetensors and JSON that are complete once their manifest of hashes is there."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from instseg.data.files import sha256_of
from instseg.storage import Place, StoragePath

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
MODEL, CONFIG = "model.safetensors", "config.json"
_OPTIMIZER, _STATE, _MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"
_EPOCH = "epoch_"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Where it lies.
        config: What the network was built from and trained with: at least "model" and "num_labels", and "classes"
            where it was trained on a prepared data set.
        state: Counters of the training loop: at least "epoch", the number of finished epochs; in the middle of one
            also "images", how many of them the next has taken.
    """

    folder: StoragePath
    config: dict[str, Any]
    state: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        """The network's state dict."""
        return _load(self.folder / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's moments and step counts, "<parameter>.<quantity>"."""
        return _load(self.folder / _OPTIMIZER)


def write_checkpoint(
    folder: Path,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a checkpoint into a folder of this machine, to be published.

    Raises:
        OSError: If they cannot be written, e.g. because the disk is full.
    """
    _write_tensors(folder / MODEL, model)
    _write_tensors(folder / _OPTIMIZER, optimizer or {})
    _write_json(folder / CONFIG, config)
    _write_json(folder / _STATE, state or {})
    _write_json(folder / _MANIFEST, {name: sha256_of(folder / name) for name in (MODEL, _OPTIMIZER, CONFIG, _STATE)})


def publish_checkpoint(source: Path, folder: StoragePath) -> None:
    """Copy what `write_checkpoint` wrote, its manifest last; one that is there, damaged or not, goes first.

    A process killed at any moment leaves all of it, or what is no checkpoint.

    Raises:
        OSError: If it cannot be written.
    """
    (folder / _MANIFEST).delete()
    for name in (MODEL, _OPTIMIZER, CONFIG, _STATE, _MANIFEST):
        (folder / name).publish_file(source / name)


def save_checkpoint(
    folder: Place,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write and publish a checkpoint. Raises OSError if it cannot be written."""
    with tempfile.TemporaryDirectory() as source:
        write_checkpoint(Path(source), model, config, optimizer, state)
        publish_checkpoint(Path(source), StoragePath.of(folder))


def prune_checkpoints(run: StoragePath, keep: int, kept: Set[str] = frozenset()) -> None:
    """Delete all but the newest `keep` checkpoints of a run directory, and those named in `kept`, complete or not."""
    for name in sorted({*_epochs(run)[:-keep]} - kept):
        (run / FOLDER / name / _MANIFEST).delete()  # so that what is half deleted is no checkpoint
        (run / FOLDER / name).delete_folder()


def read_checkpoint(place: Place) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        FileNotFoundError: If it has no manifest, that is, was not finished.
        ValueError: If a file is not what the manifest says.
    """
    folder = StoragePath.of(place)
    if (folder / _MANIFEST).size() is None:
        raise FileNotFoundError(f"checkpoint {folder}: no {_MANIFEST} in it; it is incomplete, or no checkpoint")
    for name, digest in _read_json(folder / _MANIFEST).items():
        if (folder / name).size() is None or sha256_of(folder / name) != digest:
            raise ValueError(f"checkpoint {folder}: {name} is damaged or missing; use another checkpoint")
    return Checkpoint(folder, _read_json(folder / CONFIG), _read_json(folder / _STATE))


def latest_checkpoint(place: Place) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint of a run directory, if there is one; warns of damaged ones."""
    run = StoragePath.of(place)
    for name in reversed(_epochs(run)):
        try:
            return read_checkpoint(run / FOLDER / name)
        except FileNotFoundError:  # its writer was killed, or has not finished
            continue
        except ValueError as error:
            log.warning("%s. It is passed over for the one before it, if there is one", error)
    return None


def checkpoint_steps(run: StoragePath) -> dict[str, int]:
    """Names of the complete checkpoints of a run directory, the oldest first, and the steps taken before each."""
    folders = {name: run / FOLDER / name for name in _epochs(run)}
    complete = {name: folder for name, folder in folders.items() if (folder / _MANIFEST).size() is not None}
    return {name: _read_json(folder / _STATE).get("step", 0) for name, folder in complete.items()}


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


def epoch_folder(run: Place, epoch: int, images: int = 0) -> StoragePath:
    """Where the checkpoint after `epoch` epochs and `images` images of the next one lies; names sort by time."""
    name = f"{_EPOCH}{epoch:04d}"
    return StoragePath.of(run) / FOLDER / (f"{name}_image_{images:07d}" if images else name)


def _epochs(run: StoragePath) -> list[str]:
    """Names of the folders of all checkpoints, oldest first."""
    return [name for name in (run / FOLDER).folders() if name.startswith(_EPOCH)]


def find_checkpoint(place: Place) -> Checkpoint:
    """The checkpoint at a place, or the latest one of the run directory there.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If the checkpoint at that place is damaged.
    """
    path = StoragePath.of(place)
    if (path / _MANIFEST).size() is not None:
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


def _load(file: StoragePath) -> dict[str, Tensor]:
    return load_file(file.local) if file.local is not None else load(file.read_bytes())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _read_json(path: StoragePath) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"checkpoint {path.parent}: {path.name} is damaged ({error})") from None
