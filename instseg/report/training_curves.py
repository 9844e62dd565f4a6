"""Curves of a training in one picture: losses and scores of several stages over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.colours import PALETTE
from instseg.report.pictures import save_figure
from instseg.storage import Place

Curve = Sequence[tuple[int, float]]  # (step, value), steps rising
_PANEL_INCHES = (11.0, 2.4)
_DENSE = 30  # points from which a curve is drawn pale, with its running mean on top
_WINDOW = 15  # points of that mean, around each; odd


def save_training_curves(place: Place, stages: Mapping[str, Mapping[str, Curve]], panels: Sequence[str]) -> None:
    """Draw one panel for each quantity over the steps of all stages, one stage after the other.

    Args:
        place: PNG to write.
        stages: By name, in their order, the curves by quantity; each stage counts its steps from 0.
        panels: Quantities in their order; one that a stage has not stays empty there.

    Raises:
        ValueError: If no stage has a point.
    """
    lengths = [max((step for curve in curves.values() for step, _ in curve), default=0) for curves in stages.values()]
    if not sum(lengths):
        raise ValueError("stages: expected curves with steps after 0, got none")
    starts = [0, *accumulate(lengths)]
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width, height * len(panels) + 0.6), dpi=120, layout="constrained")
    cells = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, quantity in zip(cells, panels, strict=True):
        for index, (name, curves) in enumerate(stages.items()):
            _draw(axes, curves.get(quantity, ()), starts[index], PALETTE[(index + 1) % len(PALETTE)], name)
            axes.axvline(starts[index + 1], color="0.8", lw=0.8, zorder=0)
        axes.set_ylabel(quantity, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _name_stages(cells[0], list(stages), starts)
    cells[-1].set_xlabel("step", fontsize=9)
    cells[-1].set_xlim(0, starts[-1])
    save_figure(figure, place)


def _draw(axes: Axes, curve: Curve, start: int, colour: np.ndarray, stage: str) -> None:
    if not curve:
        return
    steps, values = np.array(curve, np.float64).T
    if len(values) < _DENSE:
        axes.plot(start + steps, values, "o-", color=colour, lw=1.5, ms=3.5, label=stage)
        text, end = f"{values[-1]:.3g}", (start + steps[-1], values[-1])
        offset: dict[str, Any] = {"xytext": (-4, 6), "textcoords": "offset points", "ha": "right"}
        axes.annotate(text, end, **offset, fontsize=7.5, color=colour)
        return
    axes.plot(start + steps, values, color=colour, lw=0.7, alpha=0.35)
    mean = np.convolve(values, np.ones(_WINDOW) / _WINDOW, "valid")
    axes.plot(start + steps[_WINDOW // 2 : -(_WINDOW // 2)], mean, color=colour, lw=1.6, label=stage)


def _name_stages(axes: Axes, names: Sequence[str], starts: Sequence[int]) -> None:
    """Above the first panel, each over the middle of its steps."""
    for name, begin, end in zip(names, starts, starts[1:], strict=False):
        axes.text(
            (begin + end) / 2,
            1.04,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=9,
            parse_math=False,
        )
