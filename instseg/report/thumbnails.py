"""The pictures of one image in a gallery: JPEG for pixels, SVG on top of it for boxes and names."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from instseg.report.colours import class_colours
from instseg.report.pictures import COLUMNS, MIN_SHOWN_SCORE, blend, widest_place
from instseg.structures import InstanceMap, Sample

_SIDE, _QUALITY = 400, 80  # pixels of the longer side, and JPEG's quality: some 15 KB a picture


def thumbnails(
    sample: Sample, predicted: InstanceMap, classes: Sequence[str], colours: np.ndarray, true_colours: np.ndarray
) -> list[str]:
    """Figures of what `COLUMNS` names; the last is missing without ground truth.

    Args:
        sample: The image, of the size of `predicted`; true instances as `Sample.known_instances` has them.
        predicted: K instances and the semantic segmentation.
        classes: Class names, [0] is "background".
        colours: (K+1, 3) float in 0..1 of the instances.
        true_colours: (G+1, 3) float in 0..1 of the true ones.
    """
    image, semantic, truth = sample.image, predicted.semantic, sample.instances
    figures = [_figure(image / np.float32(255), _boxes(sample, predicted, classes, colours))]
    if semantic is not None:
        found = {int(label): classes[int(label)] for label in np.unique(semantic[semantic > 0])}
        figures.append(_segments(image, semantic.astype(np.int64), class_colours(len(classes)), found))
    scored = [f"{classes[int(label)]} {s:.2f}" for label, s in zip(predicted.labels, predicted.scores, strict=True)]
    figures.append(_segments(image, predicted.instances, colours, dict(enumerate(scored, 1))))
    if truth is not None:
        true_names = [classes[int(label)] for label in sample.instance_labels]
        figures.append(_segments(image, truth, true_colours, dict(enumerate(true_names, 1))))
    return [
        f"<figure>{figure}<figcaption>{escape(title)}</figcaption></figure>"
        for figure, title in zip(figures, COLUMNS, strict=False)
    ]


def _segments(image: np.ndarray, ids: np.ndarray, colours: np.ndarray, names: dict[int, str]) -> str:
    places = ((widest_place(ids[::2, ::2] == k), name) for k, name in names.items())  # in a quarter of the time
    marks = [_name(2 * place[1], 2 * place[0], name, "middle") for place, name in places if place is not None]
    return _figure(blend(image, ids, colours), "".join(marks))


def _boxes(sample: Sample, predicted: InstanceMap, classes: Sequence[str], colours: np.ndarray) -> str:
    """As `pictures.draw_boxes`: a dotted one became no instance, and is left out below `MIN_SHOWN_SCORE`."""
    detections, marks = sample.detections, []
    instance_of = {int(d): k for k, d in enumerate(predicted.detection_indices, 1)}
    for index in map(int, np.argsort(detections.scores, kind="stable")):
        instance, score = instance_of.get(index), float(detections.scores[index])
        if instance is None and score < MIN_SHOWN_SCORE:
            continue
        x0, y0, x1, y1 = map(float, detections.boxes[index])
        line = 'stroke="#fff" stroke-dasharray="2 3"' if instance is None else f'stroke="{to_hex(colours[instance])}"'
        place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        marks.append(f'<rect {place} fill="none" stroke-width="2" vector-effect="non-scaling-stroke" {line}/>')
        marks.append(_name(x0 + 3, y0 + 2, f"{classes[detections.labels[index]]} {score:.2f}", "start", "hanging"))
    return "".join(marks)


def _name(x: float, y: float, name: str, anchor: str, baseline: str = "central") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="{baseline}"'
    return f"<text {place}>{escape(name)}</text>"


def _figure(picture: np.ndarray, marks: str) -> str:
    """An SVG in the picture's own pixels, of which fewer are kept."""
    height, width = picture.shape[:2]
    small, buffer = Image.fromarray((255 * picture).round().astype(np.uint8)), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(buffer, "JPEG", quality=_QUALITY)
    content = base64.b64encode(buffer.getvalue()).decode()
    unit = f"--unit: {max(height, width) / _SIDE:.2f}px"  # of the text, so that it is as large on any picture
    shown = f'<image href="data:image/jpeg;base64,{content}" width="{width}" height="{height}"/>'
    return f'<svg viewBox="0 0 {width} {height}" style="{unit}">{shown}{marks}</svg>'
