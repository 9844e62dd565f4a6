"""Photographs, and the outputs of two networks, become Parquet shards and then a manifest (Ray Data)."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from instseg.config import InspectConfig, PrepareConfig
from instseg.data.dataset import MANIFEST, PreparedDataset
from instseg.data.files import digest
from instseg.data.manifest import collect_settings, collect_versions, has_manifest, write_manifest
from instseg.data.network_outputs import DetectionRecord, read_detections
from instseg.data.quarantine import QUARANTINE, QuarantineRow, check_share, read_quarantine, write_quarantine
from instseg.data.shards import ShardPlan, ShardReport, ShardTask
from instseg.data.stages import Draft, foreground, read, write
from instseg.jobs.cluster import cluster
from instseg.jobs.ending import command, end
from instseg.jobs.networks import describe_networks, stages_of, through_networks
from instseg.jobs.progress import progress
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.rows import rows_of
from instseg.jobs.sources import list_images
from instseg.report.preparation import stage_table
from instseg.storage import StoragePath

_ROOTS = ("devkit", "sbd", "coco", "images")  # options that name photographs


def prepare(config: PrepareConfig) -> PreparedDataset:
    """Write the data directory `config.out`; complete it if it is half-written; do nothing if it is complete.

    Its bytes depend on the content of the inputs and the settings alone, not on CPUs, paths or interruptions. Uses
    the Ray cluster that this process is connected to, or the one at RAY_ADDRESS, or starts one on this machine for
    the time of the run; with several nodes, the roots must be URIs that all of them reach. At the end it draws some of
    the images, as `inspect` does, where `contact_sheet` names a folder.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If an input is malformed as a whole, `out` is or lies under a file or holds other data, or more
            than `max_quarantined` of the images have a bad item; or if `contact_sheet` cannot be a folder.
        OSError: If `out` cannot be written, such as on a full disk, or a store cannot be reached.
    """
    if config.contact_sheet is not None:
        check_out(config.contact_sheet, "contact-sheet")
    dataset = _complete(config)
    _show(config, dataset)
    return dataset


def _complete(config: PrepareConfig) -> PreparedDataset:
    start = time.monotonic()
    check_inputs(**{name: getattr(config, name) for name in (*_ROOTS, "detections", "logits")})
    out = check_out(config.out)
    listing = list_images(config)
    records, orphans = read_detections(config.detections) if config.detections is not None else ({}, [])
    orphans += listing.quarantined + unknown_images(records, listing.known_ids)
    settings = collect_settings(config, listing, describe_networks(config))
    num_images = len(listing.items)
    if has_manifest(out, settings) and _is_sound(out):
        print(f"nothing to do: {out} is complete and was prepared with these settings", flush=True)
        check_quarantine(read_quarantine(out / QUARANTINE), num_images, config.max_quarantined, out)
        return PreparedDataset(out)

    plan = ShardPlan(
        out=out,
        source=listing.source,
        logits=None if config.logits is None else StoragePath.of(config.logits),
        min_score=config.min_score,
        grabcut=config.grabcut,
        digest=digest(settings | collect_versions(config)),
    )
    starts = range(0, num_images, config.shard_size)
    tasks = [ShardTask.of(k, listing.items[i : i + config.shard_size], records) for k, i in enumerate(starts)]
    print(f"preparing {num_images} images in {len(tasks)} shards", flush=True)
    del listing, records  # each task has its share
    reports, seconds, num_kept = _write_shards(config, plan, tasks)
    quarantined = orphans + [row for report in reports for row in report.quarantined]
    write_quarantine(out / QUARANTINE, quarantined)
    check_quarantine(quarantined, num_images, config.max_quarantined, out)
    write_manifest(out, settings, reports, quarantined, collect_versions(config))
    dataset = PreparedDataset(out)
    num_done = sum(len(report.image_ids) for report, kept in zip(reports, num_kept, strict=True) if not kept)
    print(stage_table(seconds, num_done), flush=True)
    _summarise(dataset, sum(num_kept), time.monotonic() - start)
    return dataset


def unknown_images(records: dict[str, list[DetectionRecord]], known: frozenset[str]) -> list[QuarantineRow]:
    """The detections of images that nobody knows, for the quarantine."""
    reason = "detection for an image that is not in the data set"
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


def _write_shards(
    config: PrepareConfig, plan: ShardPlan, tasks: list[ShardTask]
) -> tuple[list[ShardReport], dict[str, float], list[bool]]:
    """Send each shard through the stages, as one row, which is one block; Ray repeats a task whose worker dies.

    On CPUs all stages of a shard are one task; with GPUs the networks are actors on these, and what comes before and
    after them are tasks, all at the same time.

    Returns:
        What the shards hold, in their order; what each stage took of all workers together; which were there already.
    """
    results: dict[str, dict[str, Any]] = {}
    classes, networks = plan.source.classes, stages_of(config)
    for network in networks:
        network(config, classes, "cpu")  # a mistake in its options is found before anything is computed
    with cluster():
        roots = {name: getattr(config, name) for name in (*_ROOTS, "logits", "out")}
        check_nodes(**{name: StoragePath.of(root) for name, root in roots.items() if root is not None})
        (plan.out / MANIFEST).delete()
        rows = rows_of(tasks)
        rows = rows.map(lambda row: read(plan, ShardTask(**row)).encode(), num_cpus=1)
        rows = through_networks(rows, networks, config, classes)
        rows = rows.map(lambda row: _finish(plan, Draft.decode(row)), num_cpus=1)
        for row in progress(rows.iter_rows(), len(tasks), "prepared shards"):
            if row["error"]:
                raise OSError(row["error"])
            results[row["file"]] = json.loads(row["result"])
    _remove_leftovers(plan, tasks)
    ordered = [results[task.file] for task in tasks]
    seconds: dict[str, float] = {}
    for result in ordered:
        for stage, taken in result["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + taken
    reports = [ShardReport.of_json(result["report"]) for result in ordered]
    return reports, seconds, [result["kept"] for result in ordered]


def _finish(plan: ShardPlan, draft: Draft) -> dict[str, Any]:
    """A full disk is a result: of an exception, Ray Data would pass on neither the type nor one clear line."""
    result, error = {}, ""
    try:
        report = write(plan, foreground(plan, draft))
        result = {"report": asdict(report), "kept": draft.kept, "seconds": draft.seconds}
    except OSError as problem:
        error = str(problem)
    return {"file": draft.task.file, "result": json.dumps(result), "error": error}


def _remove_leftovers(plan: ShardPlan, tasks: list[ShardTask]) -> None:
    """Remove shards of a run with other settings that never finished, and what killed workers were writing."""
    ours = {MANIFEST, QUARANTINE} | {name for task in tasks for name in (task.file, task.report)}
    for name in plan.out.files():
        if name.startswith(("shard-", MANIFEST, QUARANTINE)) and name not in ours:
            (plan.out / name).delete()


def check_quarantine(rows: list[QuarantineRow], num_images: int, max_quarantined: float, out: StoragePath) -> None:
    """Warn of what was quarantined. Raises ValueError if that is more than `max_quarantined` of the images."""
    warning = check_share(rows, num_images, max_quarantined, out / QUARANTINE)
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _show(config: PrepareConfig, dataset: PreparedDataset) -> None:
    """The contact sheet, or how to get it."""
    if config.contact_sheet is None:
        following = [command(name, data=dataset.root, out="FOLDER") for name in ("inspect", "train")]
        end(dataset.root, following=following)
        return
    from instseg.jobs.inspect import inspect  # draws, for which it imports what the other runs go without

    print(flush=True)
    inspect(InspectConfig(config.out, config.contact_sheet))


def _summarise(dataset: PreparedDataset, num_kept: int, seconds: float) -> None:
    manifest = dataset.manifest
    kept = f" ({num_kept} of {len(manifest['shards'])} shards were there already)" if num_kept else ""
    for what, number in (manifest["notes"] | manifest["quarantined"]).items():
        print(f"{number} images {what}" if what in manifest["notes"] else f"quarantined {number}: {what}")
    print(
        f"prepared {manifest['num_images']} images, {manifest['num_instances']} instances, "
        f"{manifest['num_detections']} detections ({manifest['num_box_foregrounds']} with their box as foreground), "
        f"quarantined {manifest['num_quarantined']} items, in {seconds:.0f} s{kept}: {dataset.root}",
        flush=True,
    )
