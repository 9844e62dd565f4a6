"""Photographs become masks: PNGs of each, and COCO results of all (Ray Data)."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from instseg.config import PredictConfig
from instseg.data.coco_results import IMAGES, PANOPTIC, RESULTS, merge_parts
from instseg.data.dataset import PreparedDataset
from instseg.data.files import digest, sha256_of, write_json
from instseg.data.manifest import collect_versions
from instseg.data.predictions import SHARDS, SUMMARY, PredictionPlan, claim, clear, read_inputs, write_predictions
from instseg.data.quarantine import QUARANTINE, QuarantineRow, count_by_kind, write_quarantine
from instseg.data.shards import ShardPlan, ShardReport, ShardTask
from instseg.data.stages import Draft, foreground
from instseg.jobs.cluster import cluster
from instseg.jobs.ending import command, end
from instseg.jobs.networks import Predict, open_network, stages_of, through_networks
from instseg.jobs.predict_inputs import check_semantic, classes_of, collect_settings, list_tasks
from instseg.jobs.prepare import check_quarantine
from instseg.jobs.progress import progress
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.rows import rows_of
from instseg.models.checkpoint import find_checkpoint
from instseg.report.preparation import stage_table
from instseg.report.tables import align
from instseg.storage import StoragePath

_ROOTS = ("images", "data", "checkpoint", "detections", "logits")  # options that name inputs

_STAGES = ("read", "detect", "segment", "foreground", "predict", "write")


@dataclass
class Predictions:
    """What a run of predict left.

    Attributes:
        out: The folder.
        num_images: In COCO's JSON.
        num_instances: In all images.
        quarantined: The bad items.
        num_kept: Of the images, those that an earlier run had finished.
        seconds: What this run took from the first image on.
    """

    out: StoragePath
    num_images: int = 0
    num_instances: int = 0
    quarantined: list[QuarantineRow] = field(default_factory=list)
    num_kept: int = 0
    seconds: float = 0.0

    def add(self, report: ShardReport, kept: bool) -> None:
        """Count a shard."""
        self.num_images += len(report.image_ids)
        self.num_instances += report.num_instances
        self.quarantined += report.quarantined
        self.num_kept += kept * len(report.image_ids)

    def table(self) -> list[list[str]]:
        """The numbers, as cells."""
        rate = (self.num_images - self.num_kept) / max(self.seconds, 1e-9)
        return [
            ["images", str(self.num_images)],
            ["of them there already", str(self.num_kept)],
            ["instances", str(self.num_instances)],
            ["quarantined items", str(len(self.quarantined))],
            *([f"  {kind}", str(number)] for kind, number in count_by_kind(self.quarantined).items()),
            ["images/s", f"{rate:.2f}"],
        ]


def predict(config: PredictConfig) -> Predictions:
    """Write the masks of photographs, or of a prepared data set, to `config.out`; complete what is half-written.

    `instances/ID.png` has 16 bits a pixel, 0 where there is no instance, else its number among the image's;
    `semantic/ID.png` is indexed with VOC's palette; `overlay/ID.png` is for people. `predictions.json` are COCO results
    of all images, `images.json` the images and categories that these name, `quarantine.parquet` what could not be used.

    Images go through as they come, some at a time, and each is there once whoever is killed. The same command again
    does what is missing, damaged, or of another content now. Uses Ray as `prepare` does.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If an input is malformed as a whole, or they do not fit each other; `out` holds something else; or
            more than `max_quarantined` of the images have a bad item.
        OSError: If `out` cannot be written, or a store cannot be reached.
    """
    check_inputs(**{name: getattr(config, name) for name in _ROOTS})
    out = check_out(config.out)
    if config.checkpoint is not None:  # the one that is the latest now, whatever a training goes on to write
        config = replace(config, checkpoint=str(find_checkpoint(config.checkpoint).folder))
    dataset = None if config.data is None else PreparedDataset(config.data)
    classes = dataset.classes if dataset is not None else classes_of(config)
    network = open_network(config, classes)
    check_semantic(config, network.semantic is not None, dataset)
    tasks, source, orphans = list_tasks(config, dataset, classes)
    settings = collect_settings(config, tasks, dataset, classes)
    claim(out, settings)
    shards = ShardPlan(
        out=out / SHARDS,
        source=source,
        logits=None if config.logits is None else StoragePath.of(config.logits),
        min_score=config.min_score,
        grabcut=config.grabcut,
        digest=digest([settings, collect_versions(config), version("torch")]),
    )
    plan = PredictionPlan(out, shards, dataset is not None, config.panoptic, config.overlays)
    needs_foregrounds = dataset is None and network.detection_head is None
    done = _predict_shards(config, plan, tasks, classes, needs_foregrounds)
    write_quarantine(out / QUARANTINE, done.quarantined + orphans)
    num_images = sum(len(task.items) for task in tasks)
    check_quarantine(done.quarantined, num_images, config.max_quarantined, out)
    done.quarantined += orphans  # which are of no image that was asked for, and no share of them
    _finish_folder(config, plan, tasks, classes, done)
    return done


def _predict_shards(
    config: PredictConfig,
    plan: PredictionPlan,
    tasks: list[ShardTask],
    classes: tuple[str, ...],
    needs_foregrounds: bool,
) -> Predictions:
    """Send each shard through the stages, as `prepare` does."""
    networks, done, seconds = stages_of(config), Predictions(plan.out), Counter[str]()
    for network in networks:
        network(config, classes, "cpu")  # a mistake in its options is found before anything is computed
    with cluster():
        roots = {name: getattr(config, name) for name in (*_ROOTS, "out")}
        check_nodes(**{name: StoragePath.of(root) for name, root in roots.items() if root is not None})
        clear(plan)
        print(f"predicting the images of {len(tasks)} shards", flush=True)
        rows = rows_of(tasks)
        start = time.monotonic()
        rows = rows.map(lambda row: read_inputs(plan, ShardTask(**row)).encode(), num_cpus=1)
        rows = through_networks(rows, networks, config, classes, num_others=1)
        if needs_foregrounds:
            rows = rows.map(lambda row: foreground(plan.shards, Draft.decode(row)).encode(), num_cpus=1)
        rows = through_networks(rows, [Predict], config, classes, num_others=len(networks))
        rows = rows.map(lambda row: _write(plan, Draft.decode(row)), num_cpus=1)
        for row in progress(rows.iter_rows(), len(tasks), "predicted shards"):
            if row["error"]:
                raise OSError(row["error"])
            result = json.loads(row["result"])
            done.add(ShardReport.of_json(result["report"]), result["kept"])
            seconds.update(result["seconds"])
        done.seconds = time.monotonic() - start
    seconds = {stage: seconds[stage] for stage in _STAGES if stage in seconds}
    print(stage_table(seconds, done.num_images - done.num_kept), flush=True)
    return done


def _write(plan: PredictionPlan, draft: Draft) -> dict[str, Any]:
    """A full disk is a result, as of `prepare`."""
    from instseg.report.pictures import draw_overlay

    result, error = {}, ""
    try:
        report = write_predictions(plan, draft, partial(draw_overlay, classes=plan.shards.source.classes))
        result = {"report": asdict(report), "kept": draft.kept, "seconds": draft.seconds}
    except OSError as problem:
        error = str(problem)
    return {"result": json.dumps(result), "error": error}


def _finish_folder(
    config: PredictConfig, plan: PredictionPlan, tasks: list[ShardTask], classes: tuple[str, ...], done: Predictions
) -> None:
    """What is of all shards together, the summary last; and what a person needs to know."""
    merge_parts(plan.out, [plan.shards.out / task.file for task in tasks], classes, config.panoptic)
    files = (RESULTS, IMAGES, *((PANOPTIC,) if config.panoptic else ()))
    counts = {"num_images": done.num_images, "num_instances": done.num_instances}
    write_json(plan.out / SUMMARY, counts | {"files": {name: sha256_of(plan.out / name) for name in files}})
    print("\n".join(align(done.table())))
    results = ("instances", *(("overlay",) if config.overlays else ()), RESULTS, IMAGES)
    end(plan.out, results, [_next_command(config)])


def _next_command(config: PredictConfig) -> str:
    """Where there is ground truth, how good the masks are; or how there comes to be some."""
    if config.data is not None:
        return command("evaluate", data=config.data, checkpoint=config.checkpoint, out="FOLDER")
    return command("prepare", coco="JSON", images=config.images, out="FOLDER")
