#!/usr/bin/env python
"""What AP^r_vol of the whole system makes of a cheaper GrabCut; `curve` is what a call costs, and how near it comes.

Foregrounds of a prepared data set are computed anew under each setting. The systems are the hand-set one without a
detection head, which uses them most, and those of cross-validations, two for each seed, whose heads were trained with
the foregrounds of before and of now: each image is scored by a network that was trained without it. `instseg-train
--num-folds N --held-out K --out FOLDS/fold_K/run` trains one (or `instseg-crossvalidate`, and all rows). Records are
kept in --out, so that a run that was stopped goes on. --data, and that of --folds-before, is of `instseg-prepare
--grabcut.num-iterations 5 --grabcut.box-pixels 1000000000 --grabcut.margin 1000000000`; --folds-now is trained on what
`instseg-prepare` makes of the same images by default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from instseg.config import FULL, GrabCutConfig, ModelConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import split_folds
from instseg.data.foreground import compute_foregrounds
from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.evaluation.matching import match_boxes
from instseg.evaluation.records import read_records, write_records
from instseg.evaluation.significance import compare
from instseg.models.network import InstanceNetwork
from instseg.report.ablation import PAPER_COLUMNS
from instseg.report.tables import Evaluation
from instseg.storage import StoragePath
from instseg.structures import Detections, Sample, box_to_slices

WHOLE = 10**9  # pixels, or sides of the box: more than any image has
SETTINGS: dict[str, GrabCutConfig] = {
    (BEFORE := "whole image, 5 iterations"): GrabCutConfig(5, WHOLE, WHOLE),
    "whole image, 1": GrabCutConfig(1, WHOLE, WHOLE),
    "half around, 5": GrabCutConfig(5, WHOLE, 0.5),
    "half around, 16384 px, 5": GrabCutConfig(5, margin=0.5),
    "half around, 16384 px, 2": GrabCutConfig(2, margin=0.5),
    "half around, 16384 px, 1": GrabCutConfig(margin=0.5),
    "half around, 4096 px, 1": GrabCutConfig(1, 4096, 0.5),
    "quarter around, 32768 px, 1": GrabCutConfig(1, 32768),
    "quarter around, 16384 px, 1": GrabCutConfig(),
    "quarter around, 4096 px, 1": GrabCutConfig(1, 4096),
}
PLAIN, PREPARED, BOX, DEFAULT = "plain OpenCV, whole image, 5", "as prepared", "box", "quarter around, 16384 px, 1"
CHEAP = [name for name in SETTINGS if name.endswith(("px, 2", "px, 1"))]  # of these, AP^r without a head
RETRAINED = f"{DEFAULT}, and trained so"
CURVE = [PLAIN, *SETTINGS, BOX]
EVERY = 4  # of the images serves for the curve; all do for the plain loop and the default
HAND_SET = "hand-set, no head"


class Scored(NamedTuple):
    """A row: folds of the networks (None: the hand-set one) and the setting of the foregrounds that they are given."""

    folds: str | None
    foregrounds: str


class Masks(NamedTuple):
    """Of one image: CPU seconds, share of foregrounds that are the box, IoU of each right detection with the truth."""

    seconds: float
    num_detections: int
    num_boxes: int
    ious: list[float]


def main() -> None:
    """Print what was measured and write results/foregrounds.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="prepared with the foregrounds of before")
    parser.add_argument("--folds-before", nargs="*", default=[], help="cross-validations on --data, one for each seed")
    parser.add_argument("--folds-now", nargs="*", default=[], help="those on the foregrounds of now, in the same order")
    parser.add_argument("--split", help="text file with ids of some images, such as val.txt, which get a table too")
    parser.add_argument("--out", required=True, help="folder for records")
    options = parser.parse_args()
    data, scores = os.path.abspath(options.data), dict[str, Any]()
    systems = {HAND_SET: {name: Scored(None, name) for name in (PREPARED, *CHEAP, BOX)}}
    for before, now in zip(options.folds_before, options.folds_now, strict=True):
        systems[Path(before).name] = _scored(os.path.abspath(before), os.path.abspath(now))
    with get_context("spawn").Pool(2, torch.set_num_threads, [1]) as pool:
        for system, rows in systems.items():
            paths = {name: _path(options.out, system, name) for name in rows}
            for name, path in paths.items():
                if path.size() is None:
                    jobs = [(data, rows[name].foregrounds, *job) for job in _held_out(data, rows[name].folds)]
                    write_records(path, sorted(pool.starmap(_record, jobs, 4), key=lambda record: record.image_id))
            records = {name: read_records(path) for name, path in paths.items()}
            scores[system] = {"all": _table(records, _dataset(data).classes)}
            if options.split is not None:
                ids = set(Path(options.split).read_text().split())
                some = {name: [each for each in found if each.image_id in ids] for name, found in records.items()}
                scores[system]["split"] = _table(some, _dataset(data).classes)
            print(system, json.dumps(scores[system], indent=1), flush=True)
        for name, row in scores[HAND_SET]["all"].items():  # the other systems are given the same masks
            masks = pool.starmap(_masks, [(data, index, name) for index in range(len(_dataset(data)))])
            row["mean_iou_with_truth"] = _quality(masks)["mean_iou_with_truth"]
    tables = [scores[system]["all"] for system in systems if system != HAND_SET]
    result = {"before": asdict(SETTINGS[BEFORE]), "after": asdict(SETTINGS[DEFAULT]), "ap_r": scores}
    for name in (DEFAULT, RETRAINED) if tables else ():
        result[f"mean difference: {name}"] = mean(table[name]["difference"][0] for table in tables)
    print(write_result("foregrounds", result))


def _scored(before: str, now: str) -> dict[str, Scored]:
    return {PREPARED: Scored(before, PREPARED), DEFAULT: Scored(before, DEFAULT), RETRAINED: Scored(now, DEFAULT)}


def curve(data: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each setting: CPU seconds a detection, images a second and core, share of boxes, mean IoU with the truth.

    Shares and IoU are of the same images for all; the plain loop, which has no boxes, has neither.
    """
    found = {}
    with get_context("spawn").Pool(2) as pool:
        for name in names:
            step = 1 if name in (PLAIN, DEFAULT) else EVERY
            indices = range(0, len(PreparedDataset(data)), step)
            masks = pool.starmap(_masks, [(data, index, name) for index in indices])
            found[name] = _costs(masks) | ({} if name == PLAIN else _quality(masks[:: EVERY // step]))
            print(name, json.dumps(found[name]), flush=True)
    return found


def _masks(data: str, index: int, name: str) -> Masks:
    sample = _dataset(data)[index]
    start = time.process_time()
    found, sources = _foregrounds(sample, name)
    seconds = time.process_time() - start
    masks, truth = found.foregrounds, sample.known_instances
    assert masks is not None
    assert truth is not None
    matches = match_boxes(sample.detections, truth, sample.instance_labels)
    ious = [_iou(masks[d], truth, matches[d] + 1) for d in np.flatnonzero(matches >= 0)]
    return Masks(seconds, len(found), sources.count("box"), ious)


def _foregrounds(sample: Sample, name: str) -> tuple[Detections, list[str]]:
    given, size = sample.detections, sample.image.shape[:2]
    if name == PREPARED:
        return given, []
    if name == BOX:
        return replace(given, foregrounds=given.box_masks(*size)), ["box"] * len(given)
    if name in SETTINGS:
        return compute_foregrounds(sample.image, given, sample.image_id, SETTINGS[name])
    masks = np.array([_plain(sample.image, box) for box in given.boxes], np.bool_)
    return replace(given, foregrounds=masks.reshape(-1, *size)), []


def _plain(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The loop that OpenCV's tutorial has."""
    cv2.setNumThreads(1)
    y, x = box_to_slices(box, *image.shape[:2])
    mask, models = np.zeros(image.shape[:2], np.uint8), (np.zeros((1, 65)), np.zeros((1, 65)))
    inside = max(x.start, 1), max(y.start, 1)
    size = min(x.stop, image.shape[1] - 1) - inside[0], min(y.stop, image.shape[0] - 1) - inside[1]
    try:
        cv2.grabCut(image, mask, (*inside, *size), *models, 5, cv2.GC_INIT_WITH_RECT)
    except cv2.error:
        return mask > 0
    return (mask & 1) > 0


def _iou(mask: np.ndarray, instances: np.ndarray, instance: int) -> float:
    truth = instances == instance
    return float((mask & truth).sum() / ((mask & (instances >= 0)) | truth).sum())


def _costs(masks: list[Masks]) -> dict[str, float]:
    seconds = sum(image.seconds for image in masks)
    num_detections = sum(image.num_detections for image in masks)
    return {
        "num_images": len(masks),
        "cpu_seconds_per_detection": seconds / num_detections,
        "images_per_core_second": len(masks) / max(seconds, 1e-9),
    }


def _quality(masks: list[Masks]) -> dict[str, float]:
    num_detections = sum(image.num_detections for image in masks)
    return {
        "share_of_boxes": sum(image.num_boxes for image in masks) / num_detections,
        "mean_iou_with_truth": mean(iou for image in masks for iou in image.ious),
    }


def _held_out(data: str, folds: str | None) -> Iterator[tuple[str | None, int]]:
    """Each image once: the run that was trained without it, and its index."""
    dataset = _dataset(data)
    if folds is None:
        yield from ((None, index) for index in range(len(dataset)))
        return
    num_folds = len(list(Path(folds).glob("fold_*")))
    for fold, indices in enumerate(split_folds(dataset.image_ids, num_folds, TrainConfig.fold_seed)):
        yield from ((f"{folds}/fold_{fold}/run", index) for index in indices)


@torch.inference_mode()
def _record(data: str, name: str, run: str | None, index: int) -> ImageRecord:
    dataset = _dataset(data)
    network, sample = _network(run, dataset.num_labels), dataset[index]
    sample = replace(sample, detections=_foregrounds(sample, name)[0])
    output = network(sample, FULL)
    before, validity = output.semantic_logits.argmax(0).numpy(), output.validity.numpy()
    return image_record(sample, network.instance_map(output), before, dataset.num_labels, validity)


def _table(records: dict[str, list[ImageRecord]], classes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Of each foregrounds AP^r at the paper's thresholds, its volume, mean IoU, and AP^r_vol less that of before."""
    table: dict[str, dict[str, Any]] = {}
    for name, found in records.items():
        evaluation = Evaluation.of(found, classes)
        values = (*evaluation.row(), evaluation.metrics()["mean_iou_after"])
        table[name] = {"num_images": len(found)} | dict(zip(PAPER_COLUMNS, values, strict=True))
        if name != PREPARED:  # with the ends of the 95 % interval
            table[name]["difference"] = [100 * value for value in compare(records[PREPARED], found).ap_r_vol]
    return table


def _path(out: str, system: str, name: str) -> StoragePath:
    return StoragePath.of(out) / f"{system}-{name}.arrow".replace(" ", "_")


@lru_cache
def _dataset(data: str) -> PreparedDataset:
    return PreparedDataset(data)


@lru_cache
def _network(run: str | None, num_labels: int) -> InstanceNetwork:
    return InstanceNetwork(ModelConfig(), num_labels) if run is None else InstanceNetwork.load(run)


if __name__ == "__main__":
    main()
