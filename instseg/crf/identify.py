"""Instance identification (paper 3.3, Eq. 4): from class marginals and validities to instance probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from instseg.checks import choice
from instseg.config import Background
from instseg.shapes import Bool, Float, Int

EPSILON = 1e-8  # a probability of 0 would be an infinite unary of the instance CRF


def identify(
    q: Float[Tensor, "N L"],
    validity: Float[Tensor, " D"],
    labels: Int[Tensor, " D"],
    shapes: Float[Tensor, "D N"],
    background: Background = "rescored",
) -> Float[Tensor, "N D+1"]:
    """Log Pr(v_i = k) for the D detections and the background channel d0.

    Pr(v_i = k) is proportional to Q_i(l_k) Pr(Y_k = 1) B_k(i), where B_k is 1 inside box k and 0 outside; a learned
    foreground in its place tells objects of one class apart, and may leave the box. Pixels where every shape is 0 are
    background. Elsewhere `literal` gives d0 nothing, as Eq. 4 is written; `rescored` gives it Q_i(0) max_k Pr(Y_k = 1)
    over the shapes k that are not 0 at i, so that background pixels inside a box can stay background.

    Args:
        q: (N, L) class marginals.
        validity: (D,) Pr(Y_k = 1).
        labels: (D,) int64 classes.
        shapes: (D, N) in 0..1, how far each pixel belongs to each detection.
        background: Which form of d0.

    Returns:
        (N, D+1) log probabilities, channel 0 the background.

    Raises:
        ValueError: If there is no such form of d0.
    """
    choice("background", background, Background)
    instances = q[:, labels] * validity * shapes.T
    inside = (shapes.T > 0).to(q.dtype)
    outside = 1.0 - inside.amax(1) if len(labels) else torch.ones_like(q[:, 0])
    if background == "rescored" and len(labels):
        covered = q[:, 0] * (inside * validity).amax(1)
    else:
        covered = torch.zeros_like(outside)
    weights = torch.cat([(outside + covered)[:, None], instances], dim=1)
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.log(weights / total + EPSILON)


def assign_naively(
    classes: Int[Tensor, " N"], scores: Float[Tensor, " D"], labels: Int[Tensor, " D"], boxes: Bool[Tensor, "D N"]
) -> Int[Tensor, " N"]:
    """The naive assignment of paper 3.3: a pixel joins a detection that covers it and has its class.

    Where several do, which the paper leaves open, the one with the highest score takes it.

    Args:
        classes: (N,) int64 class of each pixel.
        scores: (D,) detection scores.
        labels: (D,) int64 classes.
        boxes: (D, N) bool.

    Returns:
        (N,) int64, 0 background, k = detection k-1.
    """
    candidate = boxes & (classes == labels[:, None])
    ranked = torch.argsort(scores, descending=True, stable=True)
    if len(ranked) == 0:
        return torch.zeros_like(classes)
    best = candidate[ranked].int().argmax(0)
    return torch.where(candidate.any(0), ranked[best] + 1, 0)
