"""Colours of instances: those that touch differ, and a prediction has that of its true instance."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb
from scipy import ndimage

from instseg.structures import InstanceMap

# Far apart in hue and lightness, and readable under white text with a dark edge.
_CODES = (
    *("#e6194b", "#2f7fe0", "#3cb44b", "#f5a300", "#9b4de0", "#12b5b5", "#f0642a", "#e83fc4", "#8fc31f", "#4a55c8"),
    *("#00897b", "#b3672b", "#ff7f9f", "#6fa8ff", "#b59f00", "#a3134a", "#5fd38d", "#c99bff", "#2b6a8f", "#ff9a76"),
)
PALETTE = np.array([to_rgb(code) for code in _CODES])
TOUCHING_PIXELS = 4  # instances this close must differ in colour


def choose_colours(instances: np.ndarray, num: int, wanted: np.ndarray | None = None) -> np.ndarray:
    """Choose a colour for each instance; touching instances differ, and all do while the palette lasts.

    Args:
        instances: (H, W) integers, 0 nothing, 1..num instances.
        num: K.
        wanted: (K+1,) int64 index into PALETTE that an instance gets in any case, -1 for none.

    Returns:
        (K+1,) int64 index into PALETTE; row 0 has no meaning.
    """
    chosen = np.full(num + 1, -1) if wanted is None else wanted.copy()
    for instance in np.flatnonzero(np.append(0, chosen[1:]) < 0).tolist():
        grown = ndimage.binary_dilation(instances == instance, iterations=TOUCHING_PIXELS)
        touching = chosen[np.maximum(instances[np.asarray(grown, np.bool_)], 0)]
        uses = np.bincount(chosen[chosen >= 0], minlength=len(PALETTE))
        chosen[instance] = (uses + num * np.isin(np.arange(len(PALETTE)), touching)).argmin()
    return chosen


def paired_colours(predicted: InstanceMap, truth: np.ndarray | None, num_truths: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours of predicted instances, and of the true ones that they share them with.

    Args:
        predicted: K instances.
        truth: (H, W) integers, 0 nothing, 1..G instances, -1 void; None without ground truth.
        num_truths: G.

    Returns:
        (K+1, 3) and (G+1, 3) float in 0..1; row 0 has no meaning.
    """
    wanted, true_colours = None, np.zeros(1, np.int64)
    if truth is not None:
        true_colours = choose_colours(truth, num_truths)
        wanted = like_truth(predicted, truth, true_colours)
    return PALETTE[choose_colours(predicted.instances, len(predicted), wanted)], PALETTE[true_colours]


def class_colours(num_labels: int) -> np.ndarray:
    """(L, 3) float in 0..1 of the classes; row 0, the background, has no meaning."""
    return PALETTE[np.arange(-1, num_labels - 1) % len(PALETTE)]


def like_truth(predicted: InstanceMap, truth: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours as the truth has them.

    Args:
        predicted: K instances.
        truth: (H, W) integers, 0 nothing, 1..G instances, -1 void.
        colours: (G+1,) int64 index into PALETTE.

    Returns:
        (K+1,) int64, the colour of the true instance, for the prediction that covers most of it; -1 for the others.
    """
    shape = (len(predicted) + 1, len(colours))
    covered = np.bincount(
        np.ravel_multi_index((predicted.instances, truth.clip(min=0)), shape).ravel(),
        minlength=shape[0] * shape[1],
    ).reshape(shape)
    wanted = np.full(shape[0], -1)
    for instance in range(1, shape[0]):
        best = covered[instance, 1:].argmax() + 1 if shape[1] > 1 else 0
        if best and covered[instance, best] and covered[1:, best].argmax() + 1 == instance:
            wanted[instance] = colours[best]
    return wanted
