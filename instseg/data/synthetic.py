"""A generated data set in the layout of VOC, with the outputs of an imagined detector and semantic network.

Demo and tests go through the same reader as VOC. The imagined networks err as real ones do, and independently of each
other, because the method gains where one network is right and the other is not. Logits are coarse, washed out at
boundaries, and in places sure of a wrong class; the detector jitters, misses objects, names wrong classes and finds
things in clutter, with scores that overlap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from instseg.data.scenes import CLASSES, Scene, draw_scene
from instseg.data.voc import voc_palette
from instseg.structures import IGNORE_LABEL

_STRIDE = 8  # pixels of the image a logit
_JPEG_QUALITY = 95


def write_synthetic_devkit(
    root: str, num_train: int, num_val: int, seed: int, size: tuple[int, int] = (96, 128)
) -> None:
    """Write a VOC devkit tree, `classes.txt`, `detections.json` (COCO results) and `logits/<image_id>.npz`.

    Args:
        root: New folder; files of an earlier call are replaced.
        num_train: Images in the split "train".
        num_val: Images in the split "val".
        seed: Same seed, same bytes. An image depends on the seed and its number alone.
        size: Height and width in pixels, multiples of 8.

    Raises:
        ValueError: If `size` is not as above, or a number of images is negative.
    """
    if min(size) < 4 * _STRIDE or any(side % _STRIDE for side in size):
        raise ValueError(f"size: expected height and width as multiples of {_STRIDE}, 32 or more, got {size}")
    if min(num_train, num_val) < 0:
        raise ValueError(f"num_train, num_val: expected 0 or more, got {num_train}, {num_val}")
    folder = Path(root)
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation", "logits"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ids = [f"scene_{index:05d}" for index in range(num_train + num_val)]
    for split, members in (("train", ids[:num_train]), ("val", ids[num_train:])):
        text = "".join(f"{image_id}\n" for image_id in members)
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text(text)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    detections = []
    for index, image_id in enumerate(ids):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(rng, *size)
        _write_scene(folder, image_id, scene)
        np.savez_compressed(folder / "logits" / f"{image_id}.npz", logits=imagine_logits(rng, scene))
        detections += [{"image_id": image_id} | entry for entry in imagine_detections(rng, scene)]
    (folder / "detections.json").write_text(json.dumps(detections, indent=0) + "\n")


def imagine_logits(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """What a coarse semantic network might say of a scene: (L, H / 8, W / 8) float16."""
    num_labels, (height, width) = len(CLASSES) + 1, scene.instances.shape
    belief = np.eye(num_labels)[scene.semantic].transpose(2, 0, 1)
    for instance, label in enumerate(scene.labels, 1):
        if rng.random() < 0.4:
            _mistake(rng, belief, _part(rng, scene.instances == instance), int(label), num_labels)
    for _ in range(rng.integers(0, 3)):  # objects that are not there
        y, x = rng.uniform(0, 1, 2) * (height, width)
        rows, columns = np.indices((height, width))
        blob = np.hypot(rows - y, columns - x) < rng.uniform(0.06, 0.12) * height
        _mistake(rng, belief, blob & (scene.instances == 0), 0, num_labels)
    belief = gaussian_filter(belief, (0, 4, 4))
    coarse = belief.reshape(num_labels, height // _STRIDE, _STRIDE, width // _STRIDE, _STRIDE).mean((2, 4))
    noise = gaussian_filter(rng.normal(0, 1, coarse.shape), (0, 0.7, 0.7))
    return (5.0 * coarse + 0.6 * noise).astype(np.float16)


def _part(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The pixels of an object on one side of a line near its middle."""
    rows, columns = np.nonzero(mask)
    angle = rng.uniform(0, 2 * np.pi)
    distance = np.cos(angle) * (columns - columns.mean()) + np.sin(angle) * (rows - rows.mean())
    part = np.zeros_like(mask)
    chosen = distance > rng.uniform(-0.6, 0.5) * np.abs(distance).max()
    part[rows[chosen], columns[chosen]] = True
    return part


def _mistake(rng: np.random.Generator, belief: np.ndarray, where: np.ndarray, truth: int, num_labels: int) -> None:
    """Move belief at `where` from the truth to another label, background more often than not."""
    wrong = int(rng.choice([label for label in range(num_labels) if label != truth]))
    if truth and rng.random() < 0.5:
        wrong = 0
    share = rng.uniform(0.55, 0.8)
    belief[truth][where] -= share
    belief[wrong][where] += share


def imagine_detections(rng: np.random.Generator, scene: Scene) -> list[dict[str, Any]]:
    """What a detector might find in a scene: COCO results entries without image_id, the highest score first."""
    found = []
    for instance, label in enumerate(scene.labels, 1):
        box = _bounding_box(scene.instances == instance)
        if rng.random() < 0.9:
            found.append((int(label), rng.beta(5, 2.2), _jitter(rng, box, 0.05)))
        if rng.random() < 0.2:  # a second look at it, of another class or at a part of it
            other = int(rng.integers(1, len(CLASSES) + 1))
            found.append((other, rng.beta(3, 3), _jitter(rng, box, 0.16)))
    for box in scene.clutter:
        if rng.random() < 0.35:
            label = int(rng.integers(1, len(CLASSES) + 1))
            found.append((label, rng.beta(3.5, 3), _jitter(rng, box, 0.1)))
    height, width = scene.instances.shape
    entries = [_entry(label, score, box, height, width) for label, score, box in found]
    kept = [entry for entry in entries if min(entry["bbox"][2:]) >= 4]
    return sorted(kept, key=lambda entry: -entry["score"])


def _bounding_box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


def _jitter(rng: np.random.Generator, box: np.ndarray, sigma: float) -> np.ndarray:
    side = np.tile(box[2:] - box[:2], 2)
    return box + rng.normal(0, sigma, 4) * side


def _entry(label: int, score: float, box: np.ndarray, height: int, width: int) -> dict[str, Any]:
    x0, y0, x1, y1 = np.clip(box, 0, (width, height, width, height))
    bbox = [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)]
    return {"category_id": label, "bbox": bbox, "score": round(float(np.clip(score, 0.05, 1)), 4)}


def _write_scene(folder: Path, image_id: str, scene: Scene) -> None:
    """Image and masks; as in VOC, a strip of void surrounds every object."""
    Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=_JPEG_QUALITY)
    ids = scene.instances
    void = maximum_filter(ids, footprint=_CROSS) != minimum_filter(ids, footprint=_CROSS)
    for name, mask in (("SegmentationClass", scene.semantic), ("SegmentationObject", ids)):
        indexed = Image.fromarray(np.where(void, IGNORE_LABEL, mask).astype(np.uint8))
        indexed.putpalette(voc_palette())
        indexed.save(folder / name / f"{image_id}.png")


_CROSS = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)  # one pixel wide: up and left only
