"""What can be wrong with a training run, checked before a worker starts."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, replace
from typing import Any

import torch

from instseg.config import ModelConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.models.checkpoint import Checkpoint, check_classes, find_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.models.semantic import LOGITS, weights_file
from instseg.models.weights import load_weights
from instseg.report.provenance import origin
from instseg.storage import StoragePath

# What may differ between a run and its continuation: where things are, and how long and how safely to go on.
_FREE = {
    "out",
    "data",
    "semantic_weights",
    "start_from",
    "cpus_per_worker",
    "device",
    "max_failures",
    "checkpoint_every",
    "keep_checkpoints",
    "validation",
    "provenance",
}


# What an option is where an earlier version, which did not have it, recorded none.
_DEFAULT = {"model": asdict(ModelConfig()), "train": asdict(TrainConfig("", ""))}


def training_settings(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint records of its origin, as JSON values."""
    return {
        "model": asdict(config.model),
        "num_labels": dataset.num_labels,
        "classes": list(dataset.classes),
        "data_digest": dataset.digest,
        "train": {name: value for name, value in asdict(config).items() if name not in ("model", "tracking")},
        "provenance": origin(),
    }


def check_data(config: TrainConfig, dataset: PreparedDataset) -> None:
    """Raise ValueError if the data lacks what this training needs."""
    if len(dataset) == 0:
        raise ValueError(f"data directory {config.data}: has no images")
    sample = dataset[0]
    if sample.semantic is None or sample.instances is None:
        raise ValueError(f"data directory {config.data}: has no ground truth to train on")
    if config.model.semantic != LOGITS:
        return
    if sample.logits is None:
        advice = "prepare it with --logits, or choose a semantic network with --model.semantic"
        raise ValueError(f"data directory {config.data}: has no logits; {advice}")
    if len(sample.logits) != dataset.num_labels:
        got = f"logits of {len(sample.logits)} labels, expected {dataset.num_labels}"
        raise ValueError(f"data directory {config.data}: {got}")


def check_validation(dataset: PreparedDataset, validation: PreparedDataset) -> None:
    """Raise ValueError if the data to validate on has other classes than the data to train on, or no ground truth."""
    place = f"validation.data {validation.root}"
    if validation.classes != dataset.classes:
        classes = f"{', '.join(dataset.classes)}, got {', '.join(validation.classes)}"
        raise ValueError(f"{place}: expected the classes of the training data, {classes}; prepare both with the same")
    if validation[0].semantic is None or validation[0].instances is None:
        raise ValueError(f"{place}: has no ground truth to validate with")


def check_model(config: ModelConfig, num_labels: int) -> None:
    """Raise if there is no such network (ValueError) or no file of initial weights (FileNotFoundError)."""
    with torch.device("meta"):  # takes no time and no memory
        InstanceNetwork(replace(config, semantic_weights=None), num_labels)
    weights = weights_file(config.semantic_weights)
    if weights is not None and weights.size() is None:
        raise FileNotFoundError(f"model.semantic_weights: no file {weights}")


def check_start(config: TrainConfig, dataset: PreparedDataset) -> TrainConfig:
    """Check that the network can start from `config.start_from`.

    Returns:
        The run, with the checkpoint in place of a run directory, whose latest may be another one later.

    Raises:
        FileNotFoundError: If there is no complete checkpoint.
        ValueError: If it is damaged, or has other classes, or tensors that the network does not have.
    """
    if config.start_from is None:
        return config
    checkpoint = find_checkpoint(config.start_from)
    check_classes(checkpoint, dataset.classes)
    with torch.device("meta"):
        network = InstanceNetwork(replace(config.model, semantic_weights=None), dataset.num_labels)
    start_from(network, checkpoint)
    return replace(config, start_from=str(checkpoint.folder))


def start_from(network: InstanceNetwork, checkpoint: Checkpoint) -> None:
    """Take over the tensors of a checkpoint, by name; what it lacks stays as it is.

    Raises:
        ValueError: If the network does not have one of them, or has it in another shape, naming the first few.
    """
    tensors = network.state_dict()
    device = next(iter(tensors.values())).device
    tensors |= {name: tensor.to(device) for name, tensor in checkpoint.model().items()}
    load_weights(network, tensors, f"start_from: checkpoint {checkpoint.folder} does not fit this network")


def check_same_run(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Raise ValueError if a run with `settings` is not a continuation of the one that left the checkpoint."""
    check_classes(checkpoint, settings["classes"])
    # The cosine's length is `num_epochs`; a constant rate can go on for any time.
    free = {"num_epochs"} if settings["train"]["learning_rate_schedule"] == "constant" else set()
    check_same_settings(checkpoint.folder.parent.parent, checkpoint.config, settings, free)


def check_same_settings(
    run: StoragePath, before: dict[str, Any], now: dict[str, Any], free: Set[str] = frozenset()
) -> None:
    """Raise ValueError if `now` differs from the settings `before` of a run in what decides its outcome.

    Args:
        run: Its directory.
        before: Settings as JSON values.
        now: Settings as JSON values.
        free: Fields that may differ, besides those that always may.
    """
    if (digest := before.get("data_digest")) not in (None, now.get("data_digest")):  # None: of an earlier version
        raise ValueError(
            f"out: {run} was trained on other data (digest {digest[:12]}, not {now['data_digest'][:12]}); give the "
            "--data that it was trained on to continue, or another --out"
        )
    free = _FREE | free | {"data_digest"}
    before, now, default = (_leaves(each, free) for each in (before, now, _DEFAULT))
    for name in now | before:
        old, new = before.get(name, default.get(name)), now.get(name)
        if old != new:
            why = "; the learning rate falls to 0 at the last of them" if name == "train.num_epochs" else ""
            raise ValueError(
                f"out: {run} was trained with {name} = {old!r}, not {new!r}{why}; "
                "use the same value to continue, or another --out"
            )


def _leaves(settings: dict[str, Any], free: Set[str], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in free:
            leaves |= _leaves(value, free, f"{prefix}{name}.")
        elif name not in free:
            leaves[prefix + name] = list(value) if isinstance(value, tuple) else value  # JSON has no tuples
    return leaves
