"""A picture of the CRFs' parameters, each beside the value that training started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.colours import PALETTE
from instseg.report.pictures import save_figure
from instseg.storage import Place

_SERIES = (PALETTE[1], PALETTE[3])
_NAMES: dict[str, Any] = {"fontsize": 7, "parse_math": False}  # a dollar in a class's name is a dollar


@dataclass(frozen=True, eq=False)
class CrfParameters:
    """What both CRFs learn.

    Attributes:
        detection_weight_x: (L,) w_x of each class; that of the background is not used.
        detection_weight_y: (L,) w_y, as w_x.
        spatial_weight: (L,) of the semantic CRF.
        bilateral_weight: (L,) of the semantic CRF.
        compatibility: (L, L) mu of the semantic CRF, row l: what label l costs beside l' in column l'.
        instance_weights: Spatial and bilateral, of the instance CRF.
    """

    detection_weight_x: np.ndarray
    detection_weight_y: np.ndarray
    spatial_weight: np.ndarray
    bilateral_weight: np.ndarray
    compatibility: np.ndarray
    instance_weights: tuple[float, float]


def save_crf_parameters(
    place: Place, now: CrfParameters, initial: CrfParameters, classes: Sequence[str], title: str
) -> None:
    """Draw the weights of each class as bars from their initial values, and how the compatibility has changed.

    Args:
        place: PNG to write.
        now: The parameters.
        initial: What training started from.
        classes: L names, [0] is "background".
        title: Such as the step.
    """
    figure = Figure(figsize=(13, 8), dpi=120, layout="constrained")
    left, right = np.ravel(figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1)))
    detections, kernels = left.subplots(2, 1)
    names = [f"w_x (moves pixels), from {_range(initial.detection_weight_x[1:])}",
             f"w_y (moves Y), from {_range(initial.detection_weight_y[1:])}"]  # fmt: skip
    moved = [now.detection_weight_x - initial.detection_weight_x, now.detection_weight_y - initial.detection_weight_y]
    _bars(detections, [change[1:] for change in moved], names, classes[1:], "Detection potentials")
    names = [f"spatial, from {_range(initial.spatial_weight)}", f"bilateral, from {_range(initial.bilateral_weight)}"]
    moved = [now.spatial_weight - initial.spatial_weight, now.bilateral_weight - initial.bilateral_weight]
    _bars(kernels, moved, names, classes, "Kernels of the semantic CRF")
    _matrix(right.subplots(), now.compatibility - initial.compatibility, classes)
    (spatial, bilateral), (spatial_0, bilateral_0) = now.instance_weights, initial.instance_weights
    figure.suptitle(
        f"{title}: instance CRF spatial {spatial_0:.2f} → {spatial:.2f}, bilateral {bilateral_0:.2f} → {bilateral:.2f}",
        fontsize=11,
    )
    save_figure(figure, place)


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low}..{high}"


def _bars(axes: Axes, changes: Sequence[np.ndarray], names: Sequence[str], classes: Sequence[str], title: str) -> None:
    """Two bars for each class, of what was added to its weights."""
    width = 0.8 / len(changes)
    for index, (change, name, colour) in enumerate(zip(changes, names, _SERIES, strict=True)):
        axes.bar(np.arange(len(classes)) + (index - 0.5) * width, change, width, label=name, color=colour)
    axes.axhline(0, color="0.3", lw=0.8)
    _name(axes, classes, vertical=False)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel("change", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01, y=0.1)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.99), borderpad=0.2)


def _matrix(axes: Axes, change: np.ndarray, classes: Sequence[str]) -> None:
    largest = max(float(np.abs(change).max()), 1e-9)
    image = axes.imshow(change, cmap="RdBu_r", vmin=-largest, vmax=largest)
    _name(axes, classes, vertical=True)
    axes.set_title("Compatibility μ(l, l'), its change\n(red: costs more, blue: less)", fontsize=10)
    axes.set_ylabel("label l", fontsize=8)
    axes.set_xlabel("neighbour's label l'", fontsize=8)
    axes.figure.colorbar(image, ax=axes, shrink=0.75).ax.tick_params(labelsize=7)


def _name(axes: Axes, classes: Sequence[str], vertical: bool) -> None:
    axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor", **_NAMES)
    if vertical:
        axes.set_yticks(range(len(classes)), classes, **_NAMES)
