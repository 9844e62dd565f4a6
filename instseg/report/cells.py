"""What a contact sheet shows of an image: pictures small enough to hold many, and its objects in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from instseg.report.colours import paired_colours
from instseg.structures import InstanceMap, Sample, box_to_slices

MAX_SIDE = 640  # pixels of what is kept of an image, so that large photographs in number fit into memory
RATIOS = 0.2, 1.5  # height to width of a picture, at least and at most; longer images are shown smaller


@dataclass(frozen=True)
class DetectionRow:
    """A detection, in words.

    Attributes:
        name: Of its class.
        score: In (0, 1].
        box: xyxy, pixels of the original image.
        foreground_source: What made its foreground.
        foreground_share: Of the pixels of its box, those that are foreground.
        colour: As in HTML.
    """

    name: str
    score: float
    box: tuple[float, ...]
    foreground_source: str
    foreground_share: float
    colour: str


@dataclass(frozen=True)
class InstanceRow:
    """A true instance, in words: its class, its pixels in the original image, its colour as in HTML."""

    name: str
    num_pixels: int
    colour: str


@dataclass(frozen=True, eq=False)
class Cell:
    """What is shown of an image. `Cell.of` makes it.

    Attributes:
        sample: The image, no larger than `MAX_SIDE`, with detections without foregrounds, and with true instances as
            `Sample.known_instances` has them.
        found: The foregrounds, those of higher scores on top; instance d+1 is detection d.
        colours: (D+1, 3) float in 0..1 of the detections; that of a true instance where one covers most of it.
        true_colours: (G+1, 3) float in 0..1 of the true instances.
        size: Height and width of the original image.
        detections: The highest score first.
        instances: Those that have pixels.
    """

    sample: Sample
    found: InstanceMap
    colours: np.ndarray
    true_colours: np.ndarray
    size: tuple[int, int]
    detections: tuple[DetectionRow, ...]
    instances: tuple[InstanceRow, ...]

    @staticmethod
    def of(sample: Sample, foreground_sources: Sequence[str], classes: Sequence[str]) -> Cell:
        """Of a sample whose D detections have foregrounds.

        Args:
            sample: As the data directory has it.
            foreground_sources: D names.
            classes: Class names, [0] is "background".
        """
        small, found = shrink(sample), _paint(sample)
        colours, true_colours = paired_colours(found, small.instances, len(small.instance_labels))
        return Cell(
            sample=small,
            found=found,
            colours=colours,
            true_colours=true_colours,
            size=(sample.image.shape[0], sample.image.shape[1]),
            detections=_detection_rows(sample, foreground_sources, classes, colours),
            instances=_instance_rows(sample, classes, true_colours),
        )

    @property
    def has_truth(self) -> bool:
        """Whether there is ground truth to show."""
        return self.sample.instances is not None

    @property
    def ratio(self) -> float:
        """Height to width of its pictures."""
        height, width = self.size
        return min(max(height / width, RATIOS[0]), RATIOS[1])


def _step(height: int, width: int) -> int:
    """Every how many pixels one is kept."""
    return -(-max(height, width) // MAX_SIDE)


def _paint(sample: Sample) -> InstanceMap:
    """`Cell.found`."""
    detections, step = sample.detections, _step(*sample.image.shape[:2])
    instances = np.zeros(sample.image.shape[:2], np.int32)[::step, ::step]
    if detections.foregrounds is not None:
        for index in np.argsort(detections.scores, kind="stable"):
            instances[detections.foregrounds[index, ::step, ::step]] = index + 1
    return InstanceMap(instances, detections.labels, detections.scores, np.arange(len(detections)))


def shrink_map(predicted: InstanceMap) -> InstanceMap:
    """The instances and the semantic segmentation, no larger than `MAX_SIDE` and in the fewest bytes."""
    step, semantic = _step(*predicted.instances.shape), predicted.semantic
    small = predicted.instances[::step, ::step].astype(np.min_scalar_type(len(predicted)))
    return replace(predicted, instances=small, semantic=None if semantic is None else semantic[::step, ::step].copy())


def shrink(sample: Sample) -> Sample:
    """The image and its true instances, no larger than `MAX_SIDE`, and detections without foregrounds."""
    truth, step = sample.known_instances, _step(*sample.image.shape[:2])
    return Sample(
        image_id=sample.image_id,
        image=np.array(Image.fromarray(sample.image).reduce(step)),
        detections=replace(sample.detections, boxes=sample.detections.boxes / step, foregrounds=None),
        instances=None if truth is None else truth[::step, ::step].copy(),
        instance_labels=sample.instance_labels,
    )


def _detection_rows(
    sample: Sample, sources: Sequence[str], classes: Sequence[str], colours: np.ndarray
) -> tuple[DetectionRow, ...]:
    found, size = sample.detections, sample.image.shape[:2]
    foregrounds = found.box_masks(*size) if found.foregrounds is None else found.foregrounds
    rows = [
        DetectionRow(
            name=classes[int(found.labels[index])],
            score=float(found.scores[index]),
            box=tuple(found.boxes[index].tolist()),
            foreground_source=source,
            foreground_share=float(foregrounds[(index, *box_to_slices(found.boxes[index], *size))].mean()),
            colour=to_hex(colours[index + 1]),
        )
        for index, source in enumerate(sources)
    ]
    return tuple(sorted(rows, key=lambda row: -row.score))


def _instance_rows(sample: Sample, classes: Sequence[str], colours: np.ndarray) -> tuple[InstanceRow, ...]:
    if sample.instances is None:
        return ()
    sizes = np.bincount(sample.instances[sample.instances > 0], minlength=len(sample.instance_labels) + 1)
    return tuple(
        InstanceRow(classes[int(label)], int(sizes[instance]), to_hex(colours[instance]))
        for instance, label in enumerate(sample.instance_labels, 1)
        if sizes[instance]
    )
