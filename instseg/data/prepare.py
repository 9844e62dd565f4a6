"""A devkit and the outputs of two networks become a data directory: Parquet shards, then a manifest (Ray Data)."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import track

from instseg.config import PrepareConfig
from instseg.data.coco import DetectionRecord, read_detections
from instseg.data.dataset import MANIFEST, PreparedDataset, read_manifest
from instseg.data.quarantine import QuarantineRow, check_share, read_quarantine, write_quarantine
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardPlan, ShardReport, make_shard
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES, VocDevkit, open_devkit

QUARANTINE = "quarantine.parquet"
LINE_EVERY_S = 10.0


def prepare(config: PrepareConfig) -> PreparedDataset:
    """Write the data directory `config.out`; complete it if it is half-written; do nothing if it is complete.

    Its bytes depend on the content of the inputs and the settings alone, not on CPUs, paths or interruptions.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If an input is malformed as a whole, `out` holds other data, or more than `max_quarantined` of
            the images have a bad item.
    """
    start = time.monotonic()
    devkit, out = open_devkit(config.devkit), Path(config.out).resolve()
    image_ids = devkit.image_ids(config.split)
    classes = (BACKGROUND_NAME, *read_classes(config.classes))
    records, orphans = read_detections(config.detections)
    orphans += _unknown_images(records, devkit.known_ids().union(image_ids))
    settings = _settings(config, devkit, image_ids, classes)
    if _is_complete(out, settings):
        print(f"nothing to do: {out} is complete and was prepared with these settings", flush=True)
        _warn_of_quarantine(read_quarantine(out / QUARANTINE), len(image_ids), config.max_quarantined, out)
        return PreparedDataset(str(out))
    plan = _plan(config, devkit, image_ids, classes, records, out, _digest(settings | _versions()))
    reports = _write_shards(plan)
    _publish(plan, settings, reports, orphans, config.max_quarantined)
    dataset = PreparedDataset(str(out))
    _summarise(dataset, reports, time.monotonic() - start)
    return dataset


def read_classes(path: str | None) -> tuple[str, ...]:
    """Foreground class names, one a line; those of VOC by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, repeats a name, or names the background.
    """
    if path is None:
        return VOC_CLASSES
    if not Path(path).is_file():
        raise FileNotFoundError(f"classes {path}: no such file")
    names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not names or len(set(names)) < len(names) or BACKGROUND_NAME in names:
        raise ValueError(f"classes {path}: expected distinct foreground class names, one a line, got {names}")
    return tuple(names)


def _unknown_images(records: dict[str, list[DetectionRecord]], known: set[str]) -> list[QuarantineRow]:
    reason = "detection for an image that is not in the devkit"
    unknown = sorted(records.keys() - known)
    return [QuarantineRow(image_id, record.file, reason) for image_id in unknown for record in records[image_id]]


def _settings(
    config: PrepareConfig, devkit: VocDevkit, image_ids: list[str], classes: tuple[str, ...]
) -> dict[str, Any]:
    """All that the bytes of the data set depend on, without paths. File sizes stand for what is slow to read."""
    logits = None
    if config.logits is not None:
        if not Path(config.logits).is_dir():
            raise FileNotFoundError(f"logits {config.logits}: no such folder")
        files = [Path(config.logits) / f"{image_id}.npz" for image_id in image_ids]
        logits = _digest([file.stat().st_size if file.is_file() else -1 for file in files])
    return {
        "split": config.split,
        "classes": list(classes),
        "min_score": config.min_score,
        "grabcut_iterations": config.grabcut_iterations,
        "shard_size": config.shard_size,
        "images": _digest([(image_id, devkit.input_sizes(image_id)) for image_id in image_ids]),
        "detections": hashlib.sha256(Path(config.detections).read_bytes()).hexdigest(),
        "logits": logits,
    }


def _versions() -> dict[str, Any]:
    packages = {
        "opencv": "opencv-python-headless",
        "pyarrow": "pyarrow",
        "numpy": "numpy",
        "pillow": "pillow",
    }
    return {"format": FORMAT_VERSION} | {name: version(package) for name, package in packages.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds a complete data set of these settings.

    Raises:
        ValueError: If it holds one of other settings.
    """
    if not (out / MANIFEST).exists():
        return False
    there = read_manifest(out)["settings"]
    differing = [
        f"{key} ({there.get(key)} there, {settings[key]} now)" for key in settings if there.get(key) != settings[key]
    ]
    if differing:
        text = "; ".join(differing)
        raise ValueError(f"out {out}: holds data prepared with other settings: {text}; choose another --out")
    try:
        PreparedDataset(str(out))
    except (FileNotFoundError, ValueError) as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _plan(
    config: PrepareConfig,
    devkit: VocDevkit,
    image_ids: list[str],
    classes: tuple[str, ...],
    records: dict[str, list[DetectionRecord]],
    out: Path,
    digest: str,
) -> ShardPlan:
    starts = range(0, len(image_ids), config.shard_size)
    return ShardPlan(
        out=out,
        devkit=VocDevkit(devkit.root.resolve()),  # workers have another current directory
        logits=None if config.logits is None else str(Path(config.logits).resolve()),
        classes=classes,
        has_ground_truth=devkit.has_ground_truth(image_ids),
        min_score=config.min_score,
        grabcut_iterations=config.grabcut_iterations,
        shards=tuple(tuple(image_ids[start : start + config.shard_size]) for start in starts),
        detections={image_id: records[image_id] for image_id in image_ids if image_id in records},
        digest=digest,
    )


def _write_shards(plan: ShardPlan) -> list[ShardReport]:
    """One Ray task of one CPU a shard; Ray repeats a task whose worker dies."""
    import ray

    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / MANIFEST).unlink(missing_ok=True)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False  # `_follow` reports
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    indices = [{"shard": index} for index in range(len(plan.shards))]
    tasks = ray.data.from_items(indices, override_num_blocks=len(indices)).map(
        lambda row: {"report": make_shard(plan, row["shard"]).to_json()}, num_cpus=1
    )
    reports = [ShardReport.from_json(row["report"]) for row in _follow(tasks.iter_rows(), len(indices))]
    return sorted(reports, key=lambda report: report.file)


def _follow(rows: Iterable[Any], total: int) -> Iterator[Any]:
    if sys.stdout.isatty():
        yield from track(rows, "shards", total)
        return
    last = time.monotonic()
    for done, row in enumerate(rows, 1):
        yield row
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            print(f"prepared {done} of {total} shards", flush=True)


def _publish(
    plan: ShardPlan,
    settings: dict[str, Any],
    reports: list[ShardReport],
    orphans: list[QuarantineRow],
    max_quarantined: float,
) -> None:
    """Remove what other runs left, write the quarantine, and the manifest last."""
    names = {report.file for report in reports}
    for path in plan.out.glob("shard-*.parquet*"):
        if path.name not in names:
            path.unlink()
    rows = orphans + [row for report in reports for row in report.quarantined]
    num_images = sum(len(shard) for shard in plan.shards)
    write_quarantine(plan.out / QUARANTINE, rows)
    _warn_of_quarantine(rows, num_images, max_quarantined, plan.out)
    manifest = {
        "source": "voc",
        "split": settings["split"],
        "classes": list(plan.classes),
        "num_images": sum(report.num_rows for report in reports),
        "num_detections": sum(report.num_detections for report in reports),
        "num_box_foregrounds": sum(report.num_box_foregrounds for report in reports),
        "num_quarantined": len(rows),
        "settings": settings,
        "versions": _versions(),
        "shards": [
            {"file": r.file, "num_rows": r.num_rows, "sha256": r.sha256, "image_ids": r.image_ids} for r in reports
        ],
    }
    temporary = plan.out / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(plan.out / MANIFEST)


def _warn_of_quarantine(rows: list[QuarantineRow], num_images: int, max_quarantined: float, out: Path) -> None:
    warning = check_share(rows, num_images, max_quarantined, out / QUARANTINE)
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _summarise(dataset: PreparedDataset, reports: list[ShardReport], seconds: float) -> None:
    manifest, num_kept = dataset.manifest, sum(report.kept for report in reports)
    kept = f" ({num_kept} of {len(reports)} shards were there already)" if num_kept else ""
    print(
        f"prepared {manifest['num_images']} images, {manifest['num_detections']} detections "
        f"({manifest['num_box_foregrounds']} with their box as foreground), "
        f"quarantined {manifest['num_quarantined']} items, in {seconds:.0f} s{kept}: {dataset.root}",
        flush=True,
    )
