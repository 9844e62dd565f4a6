"""The two losses of training: pixels against classes, and against matched ground-truth instances."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from instseg.checks import choice
from instseg.config import InstanceLoss
from instseg.structures import BACKGROUND, IGNORE_LABEL

_VOID = -1


def log_loss(log_q: Tensor, target: Tensor, probability_floor: float = 0.0) -> Tensor:
    """Mean negative log-likelihood of the pixels that are not void; 0 where all of them are.

    Args:
        log_q: (L, H, W) log-probabilities in nats.
        target: (H, W) int64 label per pixel, -1 for void.
        probability_floor: f in [0, 1): the loss is that of (1 - f) q + f, so that no pixel costs more than -log(f). The
            plain log-loss (0) is ruled by pixels that are surely wrong, such as those of an object outside the box of
            its detection, and answers them by making the whole CRF unsure.

    Returns:
        Scalar in nats per pixel. Its graph reaches `log_q` in every case, so that DDP sees every parameter.
    """
    known = (target != _VOID).flatten()
    rows = log_q.flatten(1).T.contiguous()  # the CRFs' own layout, so that nothing is copied
    of_target = rows.gather(1, target.flatten().clamp(min=0)[:, None])[:, 0]
    if probability_floor:
        of_target = torch.logaddexp(
            of_target + math.log1p(-probability_floor), of_target.new_tensor(math.log(probability_floor))
        )
    return -of_target[known].sum() / known.sum().clamp(min=1)


def iou_loss(log_q: Tensor, target: Tensor) -> Tensor:
    """One minus the soft intersection over union, averaged over the labels that the target has; 0 where all is void.

    A small object counts as much as the background, as it does in AP^r, and a sure mistake costs what an area does.

    Args:
        log_q: (L, H, W) log-probabilities in nats.
        target: (H, W) int64 label per pixel, -1 for void.

    Returns:
        Scalar in 0..1. Its graph reaches `log_q` in every case.
    """
    known = (target != _VOID).flatten()
    labels = target.flatten()[known]
    q = log_q.flatten(1).T[known].exp()
    of_target = q.gather(1, labels[:, None])[:, 0]
    intersection = q.new_zeros(len(log_q)).index_add(0, labels, of_target)
    counts = torch.bincount(labels, minlength=len(log_q))
    union = counts + q.sum(0) - intersection
    present = counts > 0
    return (1.0 - intersection[present] / union[present]).sum() / present.sum().clamp(min=1)


def semantic_loss(log_q: Tensor, semantic: np.ndarray | None, probability_floor: float = 0.0) -> Tensor:
    """Pixel log-loss of the semantic segmentation (paper section 3.2).

    Args:
        log_q: (L, H, W) log-marginals of the semantic CRF.
        semantic: (H, W) uint8 ground truth, 255 void; None counts as void everywhere.
        probability_floor: As in `log_loss`.

    Returns:
        Scalar in nats per pixel.
    """
    if semantic is None:
        semantic = np.full(log_q.shape[1:], IGNORE_LABEL)
    target = np.where(semantic == IGNORE_LABEL, _VOID, semantic.astype(np.int64))
    return log_loss(log_q, torch.from_numpy(target).to(log_q.device), probability_floor)


def instance_loss(
    log_q: Tensor,
    labels: np.ndarray,
    instances: np.ndarray | None,
    instance_labels: np.ndarray,
    kind: InstanceLoss = "log",
    probability_floor: float = 0.0,
) -> Tensor:
    """Distance of the instance CRF from the ground truth renamed after its matched detections.

    The matching of Arnab & Torr, CVPR 2017, section 3.4; the BMVC paper gives none.

    Args:
        log_q: (D+1, H, W) log-marginals of the instance CRF; 0 is background.
        labels: (D,) class of each detection.
        instances: (H, W) ground truth, `Sample.known_instances`; None counts as void everywhere.
        instance_labels: (G,) class of each ground-truth instance.
        kind: `log`, the cross-entropy of that paper, or `iou_loss`.
        probability_floor: As in `log_loss`.

    Returns:
        Scalar, in nats per pixel with `log`, in 0..1 with `iou`.

    Raises:
        ValueError: If there is no such kind.
    """
    choice("kind", kind, InstanceLoss)
    if instances is None:
        instances = np.full(log_q.shape[1:], _VOID)
    predicted = log_q.detach().argmax(0).cpu().numpy()
    assigned = match_instances(predicted, labels, instances, instance_labels)
    names = np.concatenate([[BACKGROUND], assigned + 1, [_VOID]])  # void pixels, -1, read the last entry
    target = torch.from_numpy(names[instances]).to(log_q.device)
    return iou_loss(log_q, target) if kind == "iou" else log_loss(log_q, target, probability_floor)


def match_instances(
    predicted: np.ndarray, labels: np.ndarray, instances: np.ndarray, instance_labels: np.ndarray
) -> np.ndarray:
    """Give each ground-truth instance at most one detection: greatest summed IoU within classes.

    Args:
        predicted: (H, W) int, 0 background, d+1 for detection d.
        labels: (D,) class of each detection.
        instances: (H, W) int, 0 background, g+1 for instance g, -1 void; void pixels do not count.
        instance_labels: (G,) class of each ground-truth instance.

    Returns:
        (G,) int64, index of the detection; -1, which makes it background, where none of that class overlaps.
    """
    shape = (len(instance_labels) + 1, len(labels) + 1)
    cells = instances.astype(np.int64) * shape[1] + predicted
    counts = np.bincount(cells[instances >= 0], minlength=shape[0] * shape[1]).reshape(shape)
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    same_class = instance_labels[:, None] == labels[None, :]
    iou = (counts / np.maximum(union, 1))[1:, 1:] * same_class
    rows, columns = linear_sum_assignment(iou, maximize=True)
    overlaps = iou[rows, columns] > 0
    assigned = np.full(len(instance_labels), -1, np.int64)
    assigned[rows[overlaps]] = columns[overlaps]
    return assigned
