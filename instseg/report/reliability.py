"""The reliability diagram of a split's detections."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.evaluation.calibration import NUM_BINS, Calibration
from instseg.report.pictures import COLUMN_INCHES, PALETTE, save_figure
from instseg.report.tables import SCORE_TITLES
from instseg.storage import Place

COLOURS = dict(zip(SCORE_TITLES, PALETTE[[1, 3]], strict=True))


def save_reliability(place: Place, calibrations: Mapping[str, Calibration]) -> None:
    """Draw, for each kind of score, the share of right detections over the score, and how many have it.

    A bar that ends on the diagonal says what is so; above it the score is too modest, below it too sure.

    Args:
        place: PNG to write.
        calibrations: By the names in SCORE_TITLES.
    """
    size = (1.3 * COLUMN_INCHES * len(calibrations), 1.6 * COLUMN_INCHES)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    cells = figure.subplots(2, len(calibrations), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (name, found) in zip(cells.T, calibrations.items(), strict=True):
        _draw_reliability(column[0], found, COLOURS[name])
        column[0].set_title(SCORE_TITLES[name], fontsize=10, pad=4)
        column[1].bar(_centres(), found.count, 0.9 / NUM_BINS, color=COLOURS[name])
        column[1].set_xlabel("score", fontsize=8)
    cells[0, 0].set_ylabel("share right", fontsize=8)
    cells[1, 0].set_ylabel("detections", fontsize=8)
    cells[1, 0].set_ylim(0, 1.05 * max(1, *(found.count.max() for found in calibrations.values())))
    for axes in cells.flat:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, place)


def _draw_reliability(axes: Axes, found: Calibration, colour: np.ndarray) -> None:
    axes.bar(_centres(), found.share_right, 0.9 / NUM_BINS, color=colour, alpha=0.85)
    axes.plot([0, 1], [0, 1], ":", color="0.35", lw=1)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    lines = [f"AP {100 * found.ap:.1f} %", f"ECE {100 * found.ece:.1f} %", f"Brier {100 * found.brier:.1f} %"]
    text = "\n".join([*lines, f"NLL {found.nll_nats:.3f} nats"]) if found.count.any() else "no detections"
    axes.text(0.04, 0.96, text, size=7.5, va="top", linespacing=1.3)


def _centres() -> np.ndarray:
    return (np.arange(NUM_BINS) + 0.5) / NUM_BINS
