"""What predict is asked to do: classes, images and settings, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from instseg.config import ModelConfig, PredictConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import digest, sha256_of
from instseg.data.folder import ImageFolder, list_folder
from instseg.data.network_outputs import DetectionRecord, read_detections
from instseg.data.predictions import NAME, NUMBER
from instseg.data.quarantine import QuarantineRow
from instseg.data.shards import ShardTask
from instseg.data.source import Item
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
        return _list_prepared(dataset), ImageFolder(dataset.root, classes), []
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
    tasks = _list_files(listing.items, config.shard_size, records)
    return tasks, listing.source, orphans


def _list_prepared(dataset: PreparedDataset) -> list[ShardTask]:
    """A task for each shard of a data directory."""
    numbers = count(1)
    return [
        ShardTask.of(index, [_item(i, next(numbers), shard, row) for row, i in enumerate(shard["image_ids"])], {})
        for index, shard in enumerate(dataset.manifest["shards"])
    ]


def _item(image_id: str, number: int, shard: dict[str, Any], row: int) -> Item:
    record = {"file_name": shard["file"], "sha256": shard["sha256"], "row": row}
    return Item(image_id, "", record | {NUMBER: number, NAME: image_id})


def _list_files(
    items: Sequence[Item], shard_size: int, records: Mapping[str, list[DetectionRecord]]
) -> list[ShardTask]:
    """Tasks of so many files, with what another system has detected in them."""
    return [
        ShardTask.of(k, [_numbered(*each) for each in enumerate(items[i : i + shard_size], i + 1)], records)
        for k, i in enumerate(range(0, len(items), shard_size))
    ]


def _numbered(number: int, item: Item) -> Item:
    return replace(item, record=item.record | {NUMBER: number, NAME: item.record["file_name"]})


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
