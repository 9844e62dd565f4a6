"""Images as two results see them, side by side: one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.colours import PALETTE, choose_colours, like_truth
from instseg.report.pictures import COLUMN_INCHES, PLAIN, blend, name_instances, save_figure, show, write
from instseg.storage import Place
from instseg.structures import InstanceMap, Sample

_CAPTION, _HEAD = 0.28, 0.34  # inches
_MAX_TITLE = 44  # characters


class Pair(NamedTuple):
    """An image with its ground truth, what each of two results makes of it, and how well, in percent."""

    sample: Sample
    maps: tuple[InstanceMap, InstanceMap]
    scores: tuple[float, float]

    @property
    def caption(self) -> str:
        """The image and its change."""
        before, after = self.scores
        return f"{self.sample.image_id}:  AP^r_vol {before:.1f} → {after:.1f}"


def save_comparison_panel(place: Place, pairs: Sequence[Pair], names: tuple[str, str], classes: Sequence[str]) -> None:
    """Draw one row for each image: input, ground truth, the instances of both results with class and score.

    An instance has the colour of the true one that it covers most. Void is pale.

    Args:
        place: PNG to write.
        pairs: At least one.
        names: Of the two results.
        classes: Class names, [0] is "background".
    """
    titles = (
        "Input",
        "Ground truth",
        *(name if len(name) <= _MAX_TITLE else f"…{name[-_MAX_TITLE:]}" for name in names),
    )
    ratios = [pair.sample.image.shape[0] / pair.sample.image.shape[1] for pair in pairs]
    width = COLUMN_INCHES * len(titles)
    height = _HEAD + sum(COLUMN_INCHES * ratio + _CAPTION for ratio in ratios)
    figure, top = Figure(figsize=(width, height), dpi=130), _HEAD
    for pair, ratio in zip(pairs, ratios, strict=True):
        inches = COLUMN_INCHES * ratio
        bottom = 1 - (top + _CAPTION + inches) / height
        row = [figure.add_axes((k / 4 + 0.002, bottom, 0.246, inches / height)) for k in range(4)]
        _draw_row(row, pair, classes)
        row[0].set_title(pair.caption, fontsize=9, loc="left", pad=3, **PLAIN)
        top += inches + _CAPTION
    for k, title in enumerate(titles):
        figure.text((k + 0.5) / 4, 1 - 0.04 / height, title, size=11, ha="center", va="top", parse_math=False)
    save_figure(figure, place)


def _draw_row(row: Sequence[Axes], pair: Pair, classes: Sequence[str]) -> None:
    sample, truth = pair.sample, pair.sample.known_instances
    show(row[0], sample.image / 255)
    if truth is None:
        raise ValueError(f"{sample.image_id}: expected ground truth, got none")
    true_colours = choose_colours(truth, len(sample.instance_labels))
    show(row[1], blend(sample.image, truth, PALETTE[true_colours]))
    for instance, label in enumerate(sample.instance_labels, 1):
        write(row[1], truth == instance, classes[int(label)])
    for axes, predicted in zip(row[2:], pair.maps, strict=True):
        wanted = like_truth(predicted, truth, true_colours)
        colours = PALETTE[choose_colours(predicted.instances, len(predicted), wanted)]
        show(axes, blend(sample.image, predicted.instances, colours))
        name_instances(axes, predicted, classes)
