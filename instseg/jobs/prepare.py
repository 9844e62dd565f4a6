"""A devkit and the outputs of two networks become Parquet shards and then a manifest (Ray Data)."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from instseg.config import PrepareConfig
from instseg.data.dataset import MANIFEST, PreparedDataset
from instseg.data.files import digest
from instseg.data.manifest import collect_settings, collect_versions, has_manifest, write_manifest
from instseg.data.network_outputs import DetectionRecord, read_detections
from instseg.data.quarantine import QuarantineRow, check_share, read_quarantine, write_quarantine
from instseg.data.shards import ShardPlan, ShardReport, make_shard
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES, VocDevkit, open_devkit, read_lines
from instseg.jobs.cluster import cluster
from instseg.jobs.folder import check_folder
from instseg.jobs.progress import progress

QUARANTINE = "quarantine.parquet"


def prepare(config: PrepareConfig) -> PreparedDataset:
    """Write the data directory `config.out`; complete it if it is half-written; do nothing if it is complete.

    Its bytes depend on the content of the inputs and the settings alone, not on CPUs, paths or interruptions. Uses
    the Ray cluster that this process is connected to, or the one at RAY_ADDRESS, or starts one on this machine for
    the time of the run; every node must see the inputs and `out`.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If an input is malformed as a whole, `out` is or lies under a file or holds other data, or more
            than `max_quarantined` of the images have a bad item.
        OSError: If `out` cannot be written, such as on a full disk.
    """
    start = time.monotonic()
    check_folder(Path(config.out))
    out = Path(config.out).resolve()
    devkit = open_devkit(config.devkit)
    image_ids = devkit.image_ids(config.split)
    classes = (BACKGROUND_NAME, *read_classes(config.classes))
    records, orphans = read_detections(config.detections)
    orphans += _unknown_images(records, devkit.known_ids().union(image_ids))
    settings = collect_settings(config, devkit, image_ids, classes)
    if has_manifest(out, settings) and _is_sound(out):
        print(f"nothing to do: {out} is complete and was prepared with these settings", flush=True)
        _check_quarantine(read_quarantine(out / QUARANTINE), len(image_ids), config.max_quarantined, out)
        return PreparedDataset(str(out))

    starts = range(0, len(image_ids), config.shard_size)
    plan = ShardPlan(
        out=out,
        devkit=VocDevkit(devkit.root.resolve()),  # workers have another current directory
        logits=None if config.logits is None else str(Path(config.logits).resolve()),
        classes=classes,
        has_ground_truth=devkit.has_ground_truth(image_ids),
        min_score=config.min_score,
        grabcut_iterations=config.grabcut_iterations,
        shards=tuple(tuple(image_ids[first : first + config.shard_size]) for first in starts),
        detections={image_id: records[image_id] for image_id in image_ids if image_id in records},
        digest=digest(settings | collect_versions()),
    )
    num_kept = _write_shards(plan)
    reports = [ShardReport.read(plan.file(index)) for index in range(len(plan.shards))]
    quarantined = orphans + [row for report in reports for row in report.quarantined]
    write_quarantine(out / QUARANTINE, quarantined)
    _check_quarantine(quarantined, len(image_ids), config.max_quarantined, out)
    write_manifest(out, settings, reports, len(quarantined))
    dataset = PreparedDataset(str(out))
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"classes {path}: no such file")
    names = read_lines(Path(path))
    if not names or len(set(names)) < len(names) or BACKGROUND_NAME in names:
        raise ValueError(f"classes {path}: expected distinct foreground class names, one a line, got {names}")
    return tuple(names)


def _unknown_images(records: dict[str, list[DetectionRecord]], known: set[str]) -> list[QuarantineRow]:
    reason = "detection for an image that is not in the devkit"
    unknown = sorted(records.keys() - known)
    return [QuarantineRow(image_id, record.file, reason) for image_id in unknown for record in records[image_id]]


def _is_sound(out: Path) -> bool:
    """Whether every file of a complete run is there, byte by byte; if not, what is damaged will be made again."""
    try:
        dataset = PreparedDataset(str(out))
        dataset.verify()
        expected, got = dataset.manifest["num_quarantined"], len(read_quarantine(out / QUARANTINE))
        if got != expected:
            raise ValueError(f"{out / QUARANTINE}: expected {expected} rows, got {got}")
    except (FileNotFoundError, ValueError) as error:
        print(f"warning: {error}; making it anew now", file=sys.stderr, flush=True)
        return False
    return True


def _write_shards(plan: ShardPlan) -> int:
    """One task of one CPU a shard; Ray repeats a task whose worker dies. Returns how many shards were there already."""
    import ray.data  # takes seconds, so that --help and a run with nothing to do go without

    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / MANIFEST).unlink(missing_ok=True)
    indices = [{"shard": index} for index in range(len(plan.shards))]
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    num_kept = 0
    with cluster():
        ray.data.DataContext.get_current().enable_progress_bars = False  # `progress` reports
        tasks = ray.data.from_items(indices, override_num_blocks=len(indices)).map(
            lambda row: _try_shard(plan, row["shard"]), num_cpus=1
        )
        for result in progress(tasks.iter_rows(), len(indices), "prepared shards"):
            if result["error"]:
                raise OSError(result["error"])
            num_kept += result["kept"]
    _remove_leftovers(plan)
    return num_kept


def _try_shard(plan: ShardPlan, index: int) -> dict[str, bool | str]:
    """A full disk is a result: of an exception, Ray Data would pass on neither the type nor one clear line."""
    try:
        return {"kept": make_shard(plan, index), "error": ""}
    except OSError as error:
        return {"kept": False, "error": str(error)}


def _remove_leftovers(plan: ShardPlan) -> None:
    """Remove shards of a run with other settings that never finished, and what killed workers were writing."""
    names = {plan.file(index).stem for index in range(len(plan.shards))}
    for path in plan.out.glob("shard-*"):
        if path.stem not in names or path.suffix not in (".parquet", ".json"):
            path.unlink()


def _check_quarantine(rows: list[QuarantineRow], num_images: int, max_quarantined: float, out: Path) -> None:
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
