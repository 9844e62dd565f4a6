"""Mean-field inference in the CRF of Eq. 3: one synchronous step, and the loop over T steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from instseg.checks import non_negative
from instseg.crf.detection import DetectionPotential
from instseg.crf.pairwise import Kernels
from instseg.lattice import softmax
from instseg.shapes import Float


class MeanFieldState(NamedTuple):
    """Q after some step.

    Attributes:
        energy: (N, L), -log Q_i(l) up to a constant in l.
        validity: (D,) Q(Y_d = 1); None without detections.
    """

    energy: Float[Tensor, "N L"]
    validity: Float[Tensor, " D"] | None

    @property
    def q(self) -> Float[Tensor, "N L"]:
        """(N, L) marginals."""
        return softmax(self.energy)

    @property
    def log_q(self) -> Float[Tensor, "N L"]:
        """(N, L) log marginals."""
        return (-self.energy).log_softmax(1)


class PairwiseTerm(NamedTuple):
    """What `mean_field` needs of the pairwise term.

    Attributes:
        kernels: See `build_kernels`.
        matrices: (number of kernels, L, L), see `message_matrices`.
    """

    kernels: Kernels
    matrices: Float[Tensor, "kernels L L"]

    def message(self, q: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
        """message_i(l) = sum_l' mu(l, l') sum_m w_m(l') sum_j k_m(i, j) Q_j(l'), (N, L), an energy in nats."""
        return self.kernels.energy(q, torch.zeros_like(q), self.matrices)

    def marginals(self, unary: Float[Tensor, "N L"], num_iterations: int) -> Float[Tensor, "N L"]:
        """`mean_field(...).q` (N, L) without detections, in less memory; may overwrite `unary` without gradients."""
        if num_iterations == 0:
            return softmax(unary)
        return self.kernels.infer(unary, self.matrices, num_iterations, normalize=True, overwrite=True)


def mean_field(
    unary: Float[Tensor, "N L"], pairwise: PairwiseTerm, detections: DetectionPotential | None, num_iterations: int
) -> MeanFieldState:
    """`num_iterations` synchronous updates of every pixel and every Y_d, from Q of the unaries and the detector alone.

    Differentiable in everything that enters the potentials. Without gradients no history is kept.

    Args:
        unary: (N, L) energies.
        pairwise: The pairwise term.
        detections: The detection potentials, or None.
        num_iterations: T.

    Raises:
        ValueError: If `num_iterations` is negative.
    """
    non_negative("num_iterations", num_iterations)
    validity = None if detections is None else detections.initial_validity
    if num_iterations == 0:
        return MeanFieldState(unary, validity)
    if detections is None:
        return MeanFieldState(pairwise.kernels.infer(unary, pairwise.matrices, num_iterations, normalize=False), None)
    q = softmax(unary)
    for _ in range(num_iterations - 1):
        energy, next_validity = _without_pairwise(q, validity, unary, detections)
        q, validity = pairwise.kernels.update(q, energy, pairwise.matrices), next_validity
    return mean_field_step(q, validity, unary, pairwise, detections)


def mean_field_step(
    q: Float[Tensor, "N L"],
    validity: Float[Tensor, " D"] | None,
    unary: Float[Tensor, "N L"],
    pairwise: PairwiseTerm,
    detections: DetectionPotential | None,
) -> MeanFieldState:
    """One synchronous update of every pixel's `q` (N, L) and every Y_d's `validity` (D,)."""
    energy, next_validity = _without_pairwise(q, validity, unary, detections)
    return MeanFieldState(pairwise.kernels.energy(q, energy, pairwise.matrices), next_validity)


def _without_pairwise(
    q: Float[Tensor, "N L"],
    validity: Float[Tensor, " D"] | None,
    unary: Float[Tensor, "N L"],
    detections: DetectionPotential | None,
) -> tuple[Float[Tensor, "N L"], Float[Tensor, " D"] | None]:
    """The rest of a step from (q, validity): the pixels' other energies (N, L), and the next validity (D,)."""
    if detections is None or validity is None:
        return unary, None
    return detections.add_pixel_message(unary, validity), torch.sigmoid(detections.validity_logit(q))


def free_energy(
    state: MeanFieldState,
    unary: Float[Tensor, "N L"],
    pairwise: PairwiseTerm,
    detections: DetectionPotential | None = None,
) -> Float[Tensor, ""]:
    """E_Q[E] - H(Q) in nats: KL(Q || P) up to -log Z, so what mean-field inference minimises.

    The pairwise term counts each unordered pair once, which holds for symmetric kernels and compatibilities; the self
    term of the lattice counts half.

    Raises:
        ValueError: If the detections are not of the `tied` form, which alone has an energy.
    """
    q = state.q
    total = (q * (unary + 0.5 * pairwise.message(q) + state.log_q)).sum()
    if detections is None or state.validity is None:
        return total
    validity, prior = state.validity, detections.unary_logit
    logit = torch.logit(validity)
    total = total + detections.expected_energy(q, validity) - (validity * prior).sum()
    return total - binary_cross_entropy_with_logits(logit, validity, reduction="sum") - logsigmoid(-prior).sum()
