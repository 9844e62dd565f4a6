"""The manifest of a data directory: what it was made from, whether that is what is asked for now, what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from typing import Any

from instseg.config import PrepareConfig, ShardsConfig
from instseg.data.dataset import MANIFEST, read_manifest
from instseg.data.files import digest, sha256_of, write_json
from instseg.data.quarantine import QuarantineRow, count_by_kind
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardReport
from instseg.data.source import Listing
from instseg.storage import StorageError, StoragePath

_NETWORK_PACKAGES = {"torch": "torch", "torchvision": "torchvision"}
_PACKAGES = {"opencv": "opencv-python-headless", "pyarrow": "pyarrow", "numpy": "numpy", "pillow": "pillow"}

_NUM_READERS = 32  # a store, or a disk across a network, answers many at once
_BATCH = 4096


def collect_settings(config: PrepareConfig, listing: Listing, networks: dict[str, Any]) -> dict[str, Any]:
    """All that the bytes of a data set depend on, without paths: settings, and hashes of every input's content.

    Args:
        config: The options.
        listing: What they name.
        networks: JSON values: what the outputs of the networks that are run depend on.

    Raises:
        FileNotFoundError: If there is no folder of logits.
    """
    items, image_ids = listing.items, [item.image_id for item in listing.items]
    return {
        "sources": sorted({item.source for item in items}),
        "split": config.split,
        "classes": list(listing.source.classes),
        "min_pixels": config.min_pixels,
        "min_score": config.min_score,
        **{f"grabcut.{name}": value for name, value in asdict(config.grabcut).items()},
        "shard_size": config.shard_size,
        "image_ids": digest(image_ids),
        "images": digest_files(path for item in items for path in listing.source.files(item)),
        "records": digest([digest(item.record) for item in items]),
        "detections": None if config.detections is None else sha256_of(config.detections),
        "logits": _digest_logits(config.logits, image_ids),
        "networks": networks,
    }


def _digest_logits(folder: str | None, image_ids: list[str]) -> str | None:
    if folder is None:
        return None
    if not (root := StoragePath.of(folder)).is_folder():
        raise FileNotFoundError(f"logits {folder}: no such folder")
    return digest_files(root / f"{image_id}.npz" for image_id in image_ids)


def digest_files(paths: Iterable[StoragePath]) -> str:
    """Of the content of files, missing ones included, in their order."""
    left, digests = iter(paths), list[str | None]()
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        while batch := list(islice(left, _BATCH)):  # a pool remembers all that it is given
            digests += pool.map(_digest_file, batch)
    return digest(digests)


def _digest_file(path: StoragePath) -> str | None:
    """None where the file is missing or cannot be read, which its image's task will report."""
    try:
        return sha256_of(path)
    except StorageError:
        raise
    except OSError:
        return None


def collect_versions(config: ShardsConfig) -> dict[str, Any]:
    """Versions that the bytes may depend on, "format" being our own."""
    runs_networks = config.detector is not None or config.semantic is not None
    packages = _PACKAGES | (_NETWORK_PACKAGES if runs_networks else {})
    return {"format": FORMAT_VERSION} | {name: version(package) for name, package in packages.items()}


def has_manifest(out: StoragePath, settings: dict[str, Any]) -> bool:
    """Whether `out` has the manifest of a data set with these settings.

    Raises:
        ValueError: If it has one of other settings, or a damaged one.
    """
    if (out / MANIFEST).size() is None:
        return False
    others = differing(read_manifest(out)["settings"], settings)
    if others:
        raise ValueError(f"out {out}: holds data prepared with other settings: {others}; choose another --out")
    return True


def differing(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that are others than those there, "" if there are none."""
    return "; ".join(
        f"{name} ({there.get(name)} there, {value} now)" for name, value in now.items() if there.get(name) != value
    )


def write_manifest(
    out: StoragePath,
    settings: dict[str, Any],
    reports: list[ShardReport],
    quarantined: list[QuarantineRow],
    versions: dict[str, Any],
) -> None:
    """Write the manifest, which makes the data set complete; `versions` are `collect_versions`."""
    manifest = {
        "split": settings["split"],
        "classes": settings["classes"],
        "num_images": sum(len(report.image_ids) for report in reports),
        "num_instances": sum(report.num_instances for report in reports),
        "num_detections": sum(report.num_detections for report in reports),
        "num_box_foregrounds": sum(report.num_box_foregrounds for report in reports),
        "num_quarantined": len(quarantined),
        "quarantined": count_by_kind(quarantined),
        "notes": dict(sum((Counter(report.notes) for report in reports), Counter())),
        "settings": settings,
        "versions": versions,
        "shards": [
            {name: getattr(report, name) for name in ("file", "num_bytes", "sha256", "image_ids")} for report in reports
        ],
    }
    write_json(out / MANIFEST, manifest)
