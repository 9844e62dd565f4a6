"""The loss of the detection head: foregrounds against true masks, priors of Y_d against which detections are right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from instseg.models.crops import to_grid, windows
from instseg.models.detection_head import SeenDetections
from instseg.shapes import Bool, Float, Int
from instseg.structures import Detections

_BOX_JITTER = 0.1  # of a box's sides, by which each of its edges moves
_PRIOR_WEIGHT = 0.3  # of the priors' nats beside those of the foregrounds


def detection_loss(
    seen: SeenDetections, detections: Detections, matches: Int[np.ndarray, " D"], instances: np.ndarray | None
) -> Tensor:
    """Cross-entropy and soft Dice of the foregrounds of right detections, plus the cross-entropy of all priors.

    Args:
        seen: Of the detection head.
        detections: The D detections that it saw.
        matches: (D,) index of the instance that each has found, or -1, which leaves it no foreground to learn; see
            `match_boxes`.
        instances: (H, W) ground truth, `Sample.known_instances`; None gives 0.

    Returns:
        Scalar, in nats but for the Dice loss. Its graph reaches what was seen in every case.
    """
    loss = 0 * (seen.mask_logits.sum() + seen.prior.sum())
    if instances is None or len(detections) == 0:
        return loss
    right = torch.from_numpy(matches >= 0).to(seen.prior)
    loss = loss + _PRIOR_WEIGHT * binary_cross_entropy_with_logits(seen.prior, right)
    matched = np.flatnonzero(matches >= 0)
    if len(matched) == 0:
        return loss
    every = windows(detections, *instances.shape)
    pairs = [_truth_on_grid(instances, int(matches[d]) + 1, every[d]) for d in matched]
    truth, known = (torch.stack(planes).to(seen.prior) for planes in zip(*pairs, strict=True))
    return loss + _foreground_loss(seen.mask_logits[torch.from_numpy(matched)], truth, known)


def jitter_boxes(detections: Detections, height: int, width: int) -> Detections:
    """The detections with each edge of their boxes moved at random, as by another detector; inside the image.

    Draws from torch's generator.
    """
    sides = detections.boxes[:, 2:] - detections.boxes[:, :2]
    moved = detections.boxes + _BOX_JITTER * np.tile(sides, 2) * (2 * torch.rand(len(detections), 4).numpy() - 1)
    # An edge moves by less than half a side, so boxes inside the image keep an area there.
    boxes = np.clip(moved, 0, np.array([width, height, width, height], np.float32))
    return replace(detections, boxes=boxes)


def _truth_on_grid(
    instances: np.ndarray, instance: int, window: tuple[slice, slice]
) -> tuple[Bool[Tensor, "size size"], Bool[Tensor, "size size"]]:
    """Which pixels of the grid are mostly the instance's, and which are mostly known."""
    cut = torch.from_numpy(instances[window])
    truth, known = to_grid(torch.stack([cut == instance, cut >= 0]).float()) > 0.5
    return truth, known


def _foreground_loss(
    logits: Float[Tensor, "M size size"], truth: Float[Tensor, "M size size"], known: Float[Tensor, "M size size"]
) -> Float[Tensor, ""]:
    """Mean over pixels of the cross-entropy, and over detections of the Dice loss, of what is known."""
    entropy = (binary_cross_entropy_with_logits(logits, truth, reduction="none") * known).mean()
    q, truth = logits.sigmoid() * known, truth * known
    dice = (2 * (q * truth).sum((1, 2)) + 1) / (q.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return entropy + (1 - dice).mean()
