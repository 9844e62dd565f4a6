"""A report with everything in it, of random scenes whose names are hostile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from instseg.evaluation.ap_r import image_record
from instseg.evaluation.errors import errors_by_kind
from instseg.report import sections
from instseg.report.cells import shrink_map
from instseg.report.diagnosis import ORACLE_ROWS, Diagnosis
from instseg.report.gallery import Selection, Shown, gallery
from instseg.report.page import page
from instseg.report.tables import Evaluation
from instseg.structures import Detections, InstanceMap, Sample
from tests.evaluation.scenes import NUM_LABELS, scene

HOSTILE = "<script>alert('x')</script> & \"quoted\" and much too long"
CLASSES = ("background", HOSTILE, "cat", "dog")
NUM_IMAGES, NUM_SHOWN = 14, 10


def detected(seed: int) -> tuple[Sample, InstanceMap]:
    """A scene whose instances come from detections, and one detection more."""
    sample, predicted = scene(seed, void=True)
    rng, num = np.random.default_rng(seed), len(predicted) + 1
    boxes = np.tile(np.array([10, 20, 90, 100], np.float32), (num, 1)) + np.arange(num)[:, None]
    labels = np.append(predicted.labels, 1)
    detections = Detections(labels, rng.uniform(0.31, 1, num), boxes)
    image = rng.integers(0, 256, sample.image.shape, np.uint8)
    name = f"{sample.image_id} {HOSTILE}" if seed == 1 else sample.image_id
    semantic = np.append(0, predicted.labels).astype(np.uint8)[predicted.instances]
    return replace(sample, image=image, detections=detections, image_id=name), replace(predicted, semantic=semantic)


def shown_and_samples() -> tuple[list[Shown], dict[str, Sample]]:
    pairs = [detected(seed) for seed in range(NUM_IMAGES)]
    shown = [
        Shown(image_record(sample, found, found.semantic, NUM_LABELS, sample.detections.scores**2), shrink_map(found))
        for sample, found in pairs
        if found.semantic is not None
    ]
    return shown, {sample.image_id: sample for sample, _ in pairs}


def report() -> str:
    """The page."""
    shown, samples = shown_and_samples()
    evaluation = Evaluation.of([one.record for one in shown], CLASSES)
    rows = {row.name: evaluation for row in ORACLE_ROWS}
    diagnosis = Diagnosis(evaluation, rows, errors_by_kind(evaluation.records, NUM_LABELS))
    selection = Selection(NUM_SHOWN)
    for one in shown:
        selection.offer(one)
    chosen = selection.chosen()
    parts = [
        sections.scores(evaluation),
        sections.limits(diagnosis),
        sections.thresholds({"full": evaluation, HOSTILE: evaluation}),
        *sections.of_one(evaluation),
        gallery(chosen, (samples[one.record.image_id] for one in chosen), NUM_IMAGES, CLASSES),
    ]
    return page(f"Report of {HOSTILE}", parts, {"data": HOSTILE})
