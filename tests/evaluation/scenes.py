"""Random images with instances, void and predictions, for tests against what works on masks."""

from __future__ import annotations

import numpy as np

from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.structures import Detections, InstanceMap, Sample

NUM_LABELS, HEIGHT, WIDTH = 4, 120, 140


def scene(seed: int, void: bool) -> tuple[Sample, InstanceMap]:
    """Truth of 0 to 5 boxes, void among them if so asked, and predictions that are the truth, moved and relabelled."""
    rng = np.random.default_rng(seed)
    truth, num = np.zeros((HEIGHT, WIDTH), np.int32), int(rng.integers(0, 6))
    for index in range(num):
        truth[_box(rng)] = index + 1
    found = np.roll(truth, rng.integers(-4, 5, 2), (0, 1))
    for index in range(int(rng.integers(0, 3))):
        found[_box(rng)] = num + index + 1
    for _ in range(3 * void):
        truth[_box(rng)] = -1
    labels = rng.integers(1, NUM_LABELS, num)
    guessed = np.where(rng.random(num) < 0.8, labels, rng.integers(1, NUM_LABELS, num))
    guessed = np.concatenate([guessed, rng.integers(1, NUM_LABELS, found.max(initial=num) - num)]).astype(np.int64)
    semantic = np.append(np.append(0, labels), 255).astype(np.uint8)[truth]
    image, nothing = np.zeros((HEIGHT, WIDTH, 3), np.uint8), Detections.empty(HEIGHT, WIDTH)
    sample = Sample(f"image_{seed:03d}", image, nothing, semantic, truth, labels)
    scores = (rng.integers(1, 6, len(guessed)) / 5).astype(np.float32)  # ties
    return sample, InstanceMap(found, guessed, scores, np.arange(len(guessed)), np.zeros_like(semantic))


def record_of(sample: Sample, predicted: InstanceMap) -> ImageRecord:
    assert predicted.semantic is not None
    return image_record(sample, predicted, predicted.semantic, NUM_LABELS)


def _box(rng: np.random.Generator) -> tuple[slice, slice]:
    """From a few pixels to sizes that are large in COCO's terms."""
    y, x = rng.integers(0, HEIGHT - 4), rng.integers(0, WIDTH - 4)
    return slice(y, y + rng.integers(4, HEIGHT)), slice(x, x + rng.integers(4, WIDTH))
