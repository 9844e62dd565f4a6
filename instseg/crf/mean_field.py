"""Mean-field inference in the CRF of Eq. 3: one synchronous step, and the loop over T steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from instseg.crf.detection import DetectionPotential


class MeanFieldState(NamedTuple):
    """Q after some step.

    Attributes:
        logits: (N, L), log Q_i(l) up to a constant in l.
        validity: (D,) Q(Y_d = 1); None without detections.
    """

    logits: Tensor
    validity: Tensor | None

    @property
    def q(self) -> Tensor:
        """(N, L) marginals."""
        return self.logits.softmax(1)

    @property
    def log_q(self) -> Tensor:
        """(N, L) log marginals."""
        return self.logits.log_softmax(1)


def initial_state(unary: Tensor, detections: DetectionPotential | None) -> MeanFieldState:
    """Q of the unaries (N, L) alone: softmax(-unary), and the detector's scores."""
    return MeanFieldState(-unary, None if detections is None else detections.initial_validity)


def mean_field_step(
    state: MeanFieldState,
    unary: Tensor,
    pairwise: Callable[[Tensor], Tensor],
    detections: DetectionPotential | None,
) -> MeanFieldState:
    """One synchronous update of every pixel and every Y_d from the previous state.

    Args:
        state: Q of the previous step.
        unary: (N, L) energies.
        pairwise: Maps marginals (N, L) to the pairwise message (N, L), see `pairwise_message`.
        detections: The detection potentials, or None.
    """
    q = state.q
    energy = unary + pairwise(q)
    validity = None
    if detections is not None and state.validity is not None:
        energy = energy + detections.pixel_message(state.validity)
        validity = torch.sigmoid(detections.validity_logit(q))
    return MeanFieldState(-energy, validity)


def mean_field(
    unary: Tensor,
    pairwise: Callable[[Tensor], Tensor],
    detections: DetectionPotential | None,
    num_iterations: int,
) -> MeanFieldState:
    """`num_iterations` steps from the initial state; differentiable in everything that enters the potentials."""
    state = initial_state(unary, detections)
    for _ in range(num_iterations):
        state = mean_field_step(state, unary, pairwise, detections)
    return state


def free_energy(
    state: MeanFieldState,
    unary: Tensor,
    pairwise: Callable[[Tensor], Tensor],
    detections: DetectionPotential | None = None,
) -> Tensor:
    """E_Q[E] - H(Q) in nats (tied detections): KL(Q || P) up to -log Z, so what mean-field inference minimises.

    The pairwise term counts each unordered pair once, which holds for symmetric kernels and compatibilities; the self
    term of the lattice counts half.
    """
    q = state.q
    total = (q * (unary + 0.5 * pairwise(q) + state.log_q)).sum()
    if detections is None or state.validity is None:
        return total
    validity, prior = state.validity, detections.unary_logit
    logit = torch.logit(validity)
    total = total + detections.expected_energy(q, validity) - (validity * prior).sum()
    return total - binary_cross_entropy_with_logits(logit, validity, reduction="sum") - logsigmoid(-prior).sum()
