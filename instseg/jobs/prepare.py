"""A devkit and the outputs of two networks become Parquet shards and then a manifest (Ray Data)."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from typing import Any

from instseg.config import PrepareConfig
from instseg.data.dataset import MANIFEST, PreparedDataset
from instseg.data.files import digest
from instseg.data.manifest import collect_settings, collect_versions, has_manifest, write_manifest
from instseg.data.network_outputs import DetectionRecord, read_detections
from instseg.data.quarantine import QuarantineRow, check_share, read_quarantine, write_quarantine
from instseg.data.shards import ShardPlan, ShardReport, ShardTask, make_shard
from instseg.data.source import read_lines
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES, open_devkit
from instseg.jobs.cluster import cluster
from instseg.jobs.progress import progress
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.storage import StoragePath

QUARANTINE = "quarantine.parquet"


def prepare(config: PrepareConfig) -> PreparedDataset:
    """Write the data directory `config.out`; complete it if it is half-written; do nothing if it is complete.

    Its bytes depend on the content of the inputs and the settings alone, not on CPUs, paths or interruptions. Uses
    the Ray cluster that this process is connected to, or the one at RAY_ADDRESS, or starts one on this machine for
    the time of the run; with several nodes, the roots must be URIs that all of them reach.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If an input is malformed as a whole, `out` is or lies under a file or holds other data, or more
            than `max_quarantined` of the images have a bad item.
        OSError: If `out` cannot be written, such as on a full disk, or a store cannot be reached.
    """
    start = time.monotonic()
    check_inputs(devkit=config.devkit, detections=config.detections, logits=config.logits)
    out = check_out(config.out)
    devkit = open_devkit(config.devkit)
    image_ids = devkit.image_ids(config.split)
    classes = (BACKGROUND_NAME, *read_classes(config.classes))
    records, orphans = read_detections(config.detections)
    orphans += _unknown_images(records, devkit.known_ids().union(image_ids))
    settings = collect_settings(config, devkit, image_ids, classes)
    if has_manifest(out, settings) and _is_sound(out):
        print(f"nothing to do: {out} is complete and was prepared with these settings", flush=True)
        _check_quarantine(read_quarantine(out / QUARANTINE), len(image_ids), config.max_quarantined, out)
        return PreparedDataset(out)

    plan = ShardPlan(
        out=out,
        devkit=devkit,
        logits=None if config.logits is None else StoragePath.of(config.logits),
        classes=classes,
        has_ground_truth=devkit.has_ground_truth(image_ids),
        min_score=config.min_score,
        grabcut_iterations=config.grabcut_iterations,
        digest=digest(settings | collect_versions()),
    )
    starts = range(0, len(image_ids), config.shard_size)
    shards = [image_ids[first : first + config.shard_size] for first in starts]
    reports, num_kept = _write_shards(plan, [ShardTask.of(k, ids, records) for k, ids in enumerate(shards)])
    quarantined = orphans + [row for report in reports for row in report.quarantined]
    write_quarantine(out / QUARANTINE, quarantined)
    _check_quarantine(quarantined, len(image_ids), config.max_quarantined, out)
    write_manifest(out, settings, reports, len(quarantined))
    dataset = PreparedDataset(out)
    _summarise(dataset, num_kept, time.monotonic() - start)
    return dataset


def read_classes(path: str | None) -> tuple[str, ...]:
    """Foreground class names, one a line; those of VOC by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8, is empty, repeats a name, or names the background.
    """
    if path is None:
        return VOC_CLASSES
    try:
        names = read_lines(StoragePath.of(path))
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"classes {path}: no such file") from None
    if not names or len(set(names)) < len(names) or BACKGROUND_NAME in names:
        raise ValueError(f"classes {path}: expected distinct foreground class names, one a line, got {names}")
    return tuple(names)


def _unknown_images(records: dict[str, list[DetectionRecord]], known: set[str]) -> list[QuarantineRow]:
    reason = "detection for an image that is not in the devkit"
    unknown = sorted(records.keys() - known)
    return [QuarantineRow(image_id, record.file, reason) for image_id in unknown for record in records[image_id]]


def _is_sound(out: StoragePath) -> bool:
    """Whether every file of a complete run is there, byte by byte; if not, what is damaged will be made again."""
    try:
        dataset = PreparedDataset(out)
        dataset.verify()
        expected, got = dataset.manifest["num_quarantined"], len(read_quarantine(out / QUARANTINE))
        if got != expected:
            raise ValueError(f"{out / QUARANTINE}: expected {expected} rows, got {got}")
    except (FileNotFoundError, ValueError) as error:
        print(f"warning: {error}; making it anew now", file=sys.stderr, flush=True)
        return False
    return True


def _write_shards(plan: ShardPlan, tasks: list[ShardTask]) -> tuple[list[ShardReport], int]:
    """One task of one CPU a shard; Ray repeats a task whose worker dies.

    Returns:
        What the shards hold, in their order, and how many were there already.
    """
    import ray.data  # takes seconds, so that --help and a run with nothing to do go without

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    reports: dict[str, ShardReport] = {}
    num_kept = 0
    with cluster():
        check_nodes(devkit=plan.devkit.root, logits=plan.logits, out=plan.out)
        (plan.out / MANIFEST).delete()
        ray.data.DataContext.get_current().enable_progress_bars = False  # `progress` reports
        rows = ray.data.from_items([asdict(task) for task in tasks], override_num_blocks=len(tasks))
        results = rows.map(lambda row: _try_shard(plan, ShardTask(**row)), num_cpus=1)
        for result in progress(results.iter_rows(), len(tasks), "prepared shards"):
            if result["error"]:
                raise OSError(result["error"])
            num_kept += result["kept"]
            report = ShardReport.of_json(json.loads(result["report"]))
            reports[report.file] = report
    _remove_leftovers(plan, tasks)
    return [reports[task.file] for task in tasks], num_kept


def _try_shard(plan: ShardPlan, task: ShardTask) -> dict[str, Any]:
    """A full disk is a result: of an exception, Ray Data would pass on neither the type nor one clear line."""
    try:
        report, kept = make_shard(plan, task)
        return {"report": json.dumps(asdict(report)), "kept": kept, "error": ""}
    except OSError as error:
        return {"report": "", "kept": False, "error": str(error)}


def _remove_leftovers(plan: ShardPlan, tasks: list[ShardTask]) -> None:
    """Remove shards of a run with other settings that never finished, and what killed workers were writing."""
    ours = {name for task in tasks for name in (task.file, task.report)}
    for name in plan.out.files():
        if name.startswith("shard-") and name not in ours:
            (plan.out / name).delete()


def _check_quarantine(rows: list[QuarantineRow], num_images: int, max_quarantined: float, out: StoragePath) -> None:
    warning = check_share(rows, num_images, max_quarantined, out / QUARANTINE)
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _summarise(dataset: PreparedDataset, num_kept: int, seconds: float) -> None:
    manifest = dataset.manifest
    kept = f" ({num_kept} of {len(manifest['shards'])} shards were there already)" if num_kept else ""
    print(
        f"prepared {manifest['num_images']} images, {manifest['num_detections']} detections "
        f"({manifest['num_box_foregrounds']} with their box as foreground), "
        f"quarantined {manifest['num_quarantined']} items, in {seconds:.0f} s{kept}: {dataset.root}",
        flush=True,
    )
