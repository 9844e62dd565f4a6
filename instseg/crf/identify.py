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
    boxes: Bool[Tensor, "D N"],
    background: Background = "rescored",
) -> Float[Tensor, "N D+1"]:
    """Log Pr(v_i = k) for the D detections and the background channel d0.

    Pr(v_i = k) is proportional to Q_i(l_k) Pr(Y_k = 1) inside box k and 0 outside. Pixels outside all boxes are
    background. Inside boxes `literal` gives d0 nothing, as Eq. 4 is written; `rescored` gives it
    Q_i(0) max_k Pr(Y_k = 1) over the boxes k that cover i, so that background pixels inside a box can stay background.

    Args:
        q: (N, L) class marginals.
        validity: (D,) Pr(Y_k = 1).
        labels: (D,) int64 classes.
        boxes: (D, N) bool, the pixels B_k of each box.
        background: Which form of d0.

    Returns:
        (N, D+1) log probabilities, channel 0 the background.

    Raises:
        ValueError: If there is no such form of d0.
    """
    choice("background", background, Background)
    inside = boxes.T.to(q.dtype)
    instances = q[:, labels] * validity * inside
    outside = (~boxes.any(0)).to(q.dtype)
    if background == "rescored" and len(labels):
        covered = q[:, 0] * (inside * validity).amax(1)
    else:
        covered = torch.zeros_like(outside)
    weights = torch.cat([(outside + covered)[:, None], instances], dim=1)
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.log(weights / total + EPSILON)


def identify_by_foreground(
    q: Float[Tensor, "N L"],
    validity: Float[Tensor, " D"],
    labels: Int[Tensor, " D"],
    foregrounds: Float[Tensor, "D N"],
    map_weight: float,
) -> Float[Tensor, "N D+1"]:
    """Log Pr(v_i = k) where a foreground probability F_k(i) is known, not only a box (ours; Eq. 4 has B_k for it).

    Pr(v_i = k) is proportional to Q_i(l_k)^a Pr(Y_k = 1) F_k(i), and the background d0 to
    Q_i(0)^a max_k Pr(Y_k = 1) (1 - max_k F_k(i)), over the k with F_k(i) > 0; where there is none, all is background.
    The exponent a is small where F has seen the class probabilities already: with 1 they would count twice.

    Args:
        q: (N, L) class marginals.
        validity: (D,) Pr(Y_k = 1).
        labels: (D,) int64 classes.
        foregrounds: (D, N) in 0..1; 0 outside the detection's reach.
        map_weight: a, 0 or more.

    Returns:
        (N, D+1) log probabilities, channel 0 the background.
    """
    if len(labels) == 0:
        return 0.0 * q[:, :1]
    evidence = (q + EPSILON) ** map_weight
    shapes = foregrounds.T
    inside = (shapes > 0).to(q.dtype)
    instances = evidence[:, labels] * validity * shapes
    covered = evidence[:, 0] * (inside * validity).amax(1) * (1.0 - shapes.amax(1))
    weights = torch.cat([(1.0 - inside.amax(1) + covered)[:, None], instances], dim=1)
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
