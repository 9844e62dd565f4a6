"""Pictures of segmentations: rows in the manner of the paper's Figure 3, and overlays of single images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from scipy import ndimage

from instseg.report.colours import PALETTE, choose_colours, class_colours, paired_colours
from instseg.storage import Place, StoragePath
from instseg.structures import InstanceMap, Sample

COLUMNS = ("Input and detections", "Semantic segmentation", "Instance segmentation", "Ground truth")
PALE = 0.92  # void
OPACITY = 0.62
MIN_SHOWN_SCORE = 0.3  # of a detection that became no instance
COLUMN_INCHES = 3.0
PLAIN: dict[str, Any] = {"in_layout": False, "parse_math": False}  # a dollar in a class's name is a dollar


def save_panel(
    place: Place,
    samples: Sequence[Sample],
    predicted: Sequence[InstanceMap],
    classes: Sequence[str],
) -> None:
    """Draw one row for each image: input with boxes, semantic segmentation, instances, ground truth.

    A box and its instance share a colour, which is that of the true instance covered most; a dashed box became no
    instance. Void is pale. A single sample makes a one-row picture.

    Args:
        place: PNG to write.
        samples: At least one image; its last cell stays empty where there is no ground truth.
        predicted: Instance map of each sample, with `semantic`.
        classes: Class names, [0] is "background".
    """
    ratios = [sample.image.shape[0] / sample.image.shape[1] for sample in samples]
    width, height = COLUMN_INCHES * len(COLUMNS), COLUMN_INCHES * sum(ratios) + 0.25
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # pyright: ignore
    cells = figure.subplots(len(samples), len(COLUMNS), squeeze=False, height_ratios=ratios)
    for row, sample, instance_map in zip(cells, samples, predicted, strict=True):
        _draw_row(row, sample, instance_map, classes)
    for axes, title in zip(cells[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=10, pad=4)
    save_figure(figure, place)


def save_steps(
    place: Place, sample: Sample, before: np.ndarray, predicted: InstanceMap, classes: Sequence[str]
) -> None:
    """Draw what goes in and what comes out: boxes, the semantic map before and after the CRF, instances.

    Args:
        place: PNG to write.
        sample: Image and detections.
        before: (H, W) integers, the class map that went in.
        predicted: Its instances, with `semantic`.
        classes: Class names, [0] is "background".
    """
    assert predicted.semantic is not None  # for type checkers
    titles = ("Photograph and boxes", "Coarse semantic map", "After the dense CRF", "Instances")
    height, width = sample.image.shape[:2]
    cells = (COLUMN_INCHES, COLUMN_INCHES * height / width + 0.21)
    figure = Figure(figsize=(cells[0] * len(titles), cells[1]), dpi=96, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # pyright: ignore
    row = figure.subplots(1, len(titles))
    colours = PALETTE[choose_colours(predicted.instances, len(predicted))]
    show(row[0], sample.image / 255)
    draw_boxes(row[0], sample, predicted, colours, classes)
    for axes, semantic in zip(row[1:3], (before, predicted.semantic), strict=True):
        _draw_classes(axes, sample.image, semantic, classes)
    show(row[3], blend(sample.image, predicted.instances, colours))
    name_instances(row[3], predicted, classes)
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title, fontsize=10, pad=4)
    save_figure(figure, place)


def draw_overlay(image: np.ndarray, instance_map: InstanceMap, classes: Sequence[str]) -> bytes:
    """Draw the instances over the image, with class and score; a PNG of the image's size.

    Args:
        image: (H, W, 3) uint8 RGB.
        instance_map: Its instances.
        classes: Class names, [0] is "background".
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    colours = PALETTE[choose_colours(instance_map.instances, len(instance_map))]
    show(axes, overlay(image, instance_map.instances, colours))
    name_instances(axes, instance_map, classes)
    return _encode(figure)


def blend(image: np.ndarray, ids: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Tint the regions of an image and outline them; what is in no region loses its colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) integers, 0 nothing, k = 1..K regions, -1 void.
        colours: (K+1, 3) float in 0..1; row 0 is not used.

    Returns:
        (H, W, 3) float32 in 0..1.
    """
    grey = np.repeat(image.mean(axis=2, keepdims=True, dtype=np.float32) / 255, 3, axis=2)
    region, void = (ids > 0)[..., None], (ids < 0)[..., None]
    tint = colours.astype(np.float32)[np.maximum(ids, 0)]
    picture = np.where(region, (1 - OPACITY) * (0.25 + 0.75 * grey) + OPACITY * tint, 0.45 + 0.5 * grey)
    picture = np.where(void, PALE, picture)
    return np.where(_outline(ids)[..., None], 0.55 * tint, picture)


def overlay(image: np.ndarray, ids: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """As `blend`, but what is in no region stays as it is."""
    return np.where((ids > 0)[..., None], blend(image, ids, colours), image / np.float32(255))


def _draw_row(row: Sequence[Axes], sample: Sample, predicted: InstanceMap, classes: Sequence[str]) -> None:
    semantic, truth = predicted.semantic, sample.known_instances
    colours, true_colours = paired_colours(predicted, truth, len(sample.instance_labels))
    if truth is not None:
        show(row[3], blend(sample.image, truth, true_colours))
    show(row[0], sample.image / 255)
    draw_boxes(row[0], sample, predicted, colours, classes)
    if semantic is not None:
        _draw_classes(row[1], sample.image, semantic, classes)
    show(row[2], blend(sample.image, predicted.instances, colours))
    name_instances(row[2], predicted, classes)
    for axes in row:
        axes.set_axis_off()


def _draw_classes(axes: Axes, image: np.ndarray, semantic: np.ndarray, classes: Sequence[str]) -> None:
    show(axes, blend(image, semantic.astype(np.int64), class_colours(len(classes))))
    for label in map(int, np.unique(semantic[semantic > 0])):
        write(axes, semantic == label, classes[label])


def draw_boxes(axes: Axes, sample: Sample, predicted: InstanceMap, colours: np.ndarray, classes: Sequence[str]) -> None:
    """Draw each box with class and score, the best on top, in the colour of its instance.

    One of no instance is white and dotted, and left out below `MIN_SHOWN_SCORE`.

    Args:
        axes: They show the image.
        sample: Its detections.
        predicted: K instances.
        colours: (K+1, 3) float in 0..1.
        classes: Class names, [0] is "background".
    """
    detections = sample.detections
    instance_of = {int(d): k for k, d in enumerate(predicted.detection_indices, 1)}
    for index in map(int, np.argsort(detections.scores)):
        instance, score = instance_of.get(index), detections.scores[index]
        if instance is None and score < MIN_SHOWN_SCORE:
            continue
        x0, y0, x1, y1 = detections.boxes[index]
        colour = "white" if instance is None else colours[instance]
        line = ":" if instance is None else "-"
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=1.4, ls=line))
        text = f"{classes[detections.labels[index]]} {score:.2f}"
        box = {"facecolor": colour if instance else "0.35", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        axes.text(x0 + 3, y0 + 3, text, size=5.5, color="white", va="top", bbox=box, clip_on=True, **PLAIN)


def name_instances(axes: Axes, predicted: InstanceMap, classes: Sequence[str]) -> None:
    """Write class and score into each instance of a picture."""
    for instance in range(1, len(predicted) + 1):
        label, score = predicted.labels[instance - 1], predicted.scores[instance - 1]
        write(axes, predicted.instances == instance, f"{classes[label]}\n{score:.2f}")


def write(axes: Axes, mask: np.ndarray, text: str) -> None:
    """Put text where the region of an (H, W) bool mask is widest; regions too small for it stay without."""
    if (place := widest_place(mask)) is None:
        return
    y, x = place
    side = "left" if x < 0.1 * mask.shape[1] else "right" if x > 0.9 * mask.shape[1] else "center"
    shown = axes.text(x, y, text, size=6.5, color="white", ha=side, va="center", linespacing=0.9, **PLAIN)
    shown.set(path_effects=[withStroke(linewidth=1.6, foreground="0.15")])


def widest_place(mask: np.ndarray) -> tuple[int, int] | None:
    """The pixel (y, x) of an (H, W) bool mask that is farthest from its border; None if there is no room for text."""
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
    if depth.max() < 0.03 * max(mask.shape):
        return None
    y, x = divmod(int(depth.argmax()), mask.shape[1])
    return y, x


def _outline(ids: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a region beside another region or none."""
    border = np.zeros(ids.shape, np.bool_)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    border[:-1] |= ids[1:] != ids[:-1]
    border[:, :-1] |= ids[:, 1:] != ids[:, :-1]
    return border & (ids > 0)


def show(axes: Axes, picture: np.ndarray) -> None:
    """Fill the axes with an (H, W, 3) picture."""
    axes.imshow(picture, interpolation="antialiased")
    axes.set_axis_off()


def save_figure(figure: Figure, place: Place) -> None:
    """Write a PNG."""
    StoragePath.of(place).publish(_encode(figure))


def _encode(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
