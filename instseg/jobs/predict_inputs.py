"""What predict is asked to do: classes, images and settings, before anything is computed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from instseg.config import ModelConfig, PredictConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import digest, sha256_of
from instseg.data.folder import ImageFolder, list_folder
from instseg.data.network_outputs import read_detections
from instseg.data.predictions import list_files, list_prepared
from instseg.data.quarantine import QuarantineRow
from instseg.data.shards import ShardTask
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES
from instseg.jobs.networks import describe_networks
from instseg.jobs.prepare import unknown_images
from instseg.jobs.sources import read_classes
from instseg.models.checkpoint import MODEL, find_checkpoint
from instseg.storage import StoragePath


def classes_of(config: PredictConfig) -> tuple[str, ...]:
    """Those that were asked for, else the checkpoint's, else VOC's; `open_network` compares them."""
    trained = {} if config.checkpoint is None else find_checkpoint(config.checkpoint).config
    if config.classes is None and "classes" in trained:
        return tuple(trained["classes"])
    return (BACKGROUND_NAME, *(VOC_CLASSES if config.classes is None else read_classes(config.classes)))


def check_semantic(config: PredictConfig, has_own: bool, dataset: PreparedDataset | None) -> None:
    """Raise ValueError unless there is one place that class scores come from; `has_own`: the checkpoint's network."""
    given = config.semantic or config.logits
    if has_own and given:
        raise ValueError(f"semantic: expected none beside {config.checkpoint}, which has its own, got {given}")
    if dataset is not None:
        if not len(dataset):
            raise ValueError(f"data directory {config.data}: has no images")
        given = dataset[0].logits is not None
    if not has_own and not given:
        advice = "--logits FOLDER or --semantic NAME" + (" to prepare the data with" if dataset else "")
        raise ValueError(f"logits: expected {advice}, as there is no semantic network in the checkpoint, got none")


def list_tasks(
    config: PredictConfig, dataset: PreparedDataset | None, classes: tuple[str, ...]
) -> tuple[list[ShardTask], ImageFolder, list[QuarantineRow]]:
    """The shards, what reads their images, and what belongs to no image that can be used."""
    if dataset is not None:
        return list_prepared(dataset), ImageFolder(dataset.root, classes), []
    assert config.images is not None  # for type checkers: `PredictConfig` requires it here
    listing = list_folder(config.images, classes)
    assert isinstance(listing.source, ImageFolder)  # likewise
    records, orphans = read_detections(config.detections) if config.detections is not None else ({}, [])
    if records and listing.items and not records.keys() & listing.known_ids:
        raise ValueError(
            f"detections {config.detections}: are of none of the images, but of {min(records)!r}, ...; expected ids as "
            f"{min(listing.known_ids)!r}"
        )
    orphans += listing.quarantined + unknown_images(records, listing.known_ids)
    tasks = list_files(listing.items, config.shard_size, records)
    return tasks, listing.source, orphans


def collect_settings(
    config: PredictConfig, tasks: list[ShardTask], dataset: PreparedDataset | None, classes: tuple[str, ...]
) -> dict[str, Any]:
    """All that the predictions depend on but for the content of the images, which each shard looks at, and paths."""
    weights = None if config.checkpoint is None else sha256_of(StoragePath.of(config.checkpoint) / MODEL)
    return {
        "images": digest([task.images for task in tasks]) if dataset is None else dataset.digest,
        "classes": list(classes),
        "min_score": config.min_score,
        **{f"grabcut.{name}": value for name, value in asdict(config.grabcut).items()},
        "logits": config.logits is not None,
        "networks": describe_networks(config),
        "checkpoint": asdict(ModelConfig()) if weights is None else weights,
        "panoptic": config.panoptic,
        "overlays": config.overlays,
    }
