"""The manifest of a data directory: what it was made from, whether that is what is asked for now, what is in it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from instseg.config import PrepareConfig
from instseg.data.dataset import MANIFEST, read_manifest
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardReport
from instseg.data.voc import VocDevkit

_PACKAGES = {"opencv": "opencv-python-headless", "pyarrow": "pyarrow", "numpy": "numpy", "pillow": "pillow"}


def collect_settings(
    config: PrepareConfig, devkit: VocDevkit, image_ids: list[str], classes: tuple[str, ...]
) -> dict[str, Any]:
    """All that the bytes of a data set depend on, without paths; file sizes stand for content that is slow to read.

    Raises:
        FileNotFoundError: If there is no folder of logits.
    """
    return {
        "split": config.split,
        "classes": list(classes),
        "min_score": config.min_score,
        "grabcut_iterations": config.grabcut_iterations,
        "shard_size": config.shard_size,
        "images": digest([(image_id, devkit.input_sizes(image_id)) for image_id in image_ids]),
        "detections": hashlib.sha256(Path(config.detections).read_bytes()).hexdigest(),
        "logits": None if config.logits is None else _logits_digest(Path(config.logits), image_ids),
    }


def _logits_digest(folder: Path, image_ids: list[str]) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"logits {folder}: no such folder")
    files = [folder / f"{image_id}.npz" for image_id in image_ids]
    return digest([file.stat().st_size if file.is_file() else -1 for file in files])


def collect_versions() -> dict[str, Any]:
    """Versions that the bytes may depend on, "format" being our own."""
    return {"format": FORMAT_VERSION} | {name: version(package) for name, package in _PACKAGES.items()}


def digest(value: object) -> str:
    """SHA-256 of a value's JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def has_manifest(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` has the manifest of a data set with these settings.

    Raises:
        ValueError: If it has one of other settings, or a damaged one.
    """
    if not (out / MANIFEST).exists():
        return False
    there = read_manifest(out)["settings"]
    differing = [
        f"{name} ({there.get(name)} there, {value} now)" for name, value in settings.items() if there.get(name) != value
    ]
    if differing:
        text = "; ".join(differing)
        raise ValueError(f"out {out}: holds data prepared with other settings: {text}; choose another --out")
    return True


def write_manifest(out: Path, settings: dict[str, Any], reports: list[ShardReport], num_quarantined: int) -> None:
    """Write the manifest, which makes the data set complete."""
    manifest = {
        "source": "voc",
        "split": settings["split"],
        "classes": settings["classes"],
        "num_images": sum(report.num_rows for report in reports),
        "num_detections": sum(report.num_detections for report in reports),
        "num_box_foregrounds": sum(report.num_box_foregrounds for report in reports),
        "num_quarantined": num_quarantined,
        "settings": settings,
        "versions": collect_versions(),
        "shards": [
            {"file": r.file, "num_rows": r.num_rows, "sha256": r.sha256, "image_ids": r.image_ids} for r in reports
        ],
    }
    temporary = out / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(out / MANIFEST)
