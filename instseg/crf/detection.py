"""The detection potential with its latent validity Y_d (paper 3.2, Eq. 2-3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instseg.checks import choice, require
from instseg.config import DetectionForm, ValidityUnary
from instseg.shapes import Float, Int

MAX_SCORE = 1.0 - 1e-4  # a score of 1 would make Y_d certain for ever


@dataclass(frozen=True)
class DetectionPotential:
    """psi_d of Eq. 2 for the D detections of one image, and the unary of Y_d.

    With S_d = sum over F_d of Q_i(l_d):  E[psi_d] = kappa_d [q0 S_d + q1 (|F_d| - S_d)], kappa_d = w s_d / |F_d|.
    `tied` uses that kappa_d in both updates; `decoupled` moves pixels with w_x s_d and Y with w_y s_d / |F_d|.

    Attributes:
        labels: (D,) int64 classes l_d.
        scores: (D,) float scores s_d in 0..1, the detector's or learned ones.
        foregrounds: (D, N) float in 0..1, how far each pixel belongs to F_d; an empty row takes no part in the CRF.
        weight_x: (L,) class-specific weight of the pixel update.
        weight_y: (L,) class-specific weight of the Y update; in the `tied` form the one weight of both.
        form: Which of the two forms.
        unary: `logit`: logit q1 starts at logit(s); `linear`: at 2s - 1.

    Raises:
        ValueError: If there is no such form or unary.
    """

    labels: Int[Tensor, " D"]
    scores: Float[Tensor, " D"]
    foregrounds: Float[Tensor, "D N"]
    weight_x: Float[Tensor, " L"]
    weight_y: Float[Tensor, " L"]
    form: DetectionForm = "decoupled"
    unary: ValidityUnary = "logit"

    def __post_init__(self) -> None:
        choice("form", self.form, DetectionForm)
        choice("unary", self.unary, ValidityUnary)

    @property
    def initial_validity(self) -> Float[Tensor, " D"]:
        """(D,) q1 = Q(Y_d = 1) before the first iteration: the score."""
        return self.scores.clamp(max=MAX_SCORE)

    @property
    def unary_logit(self) -> Float[Tensor, " D"]:
        """(D,) psi_U(0) - psi_U(1): the evidence for Y_d = 1 from the score alone."""
        scores = self.initial_validity
        return torch.logit(scores) if self.unary == "logit" else 2.0 * scores - 1.0

    def pixel_message(self, validity: Float[Tensor, " D"]) -> Float[Tensor, "N L"]:
        """(N, L) energy that detections add to each pixel's labels, given `validity` (D,); overlaps add up.

        Up to a constant in l this is kappa_d q0 for l_d and kappa_d q1 for every other label.
        """
        return self.foregrounds.T @ self._push(validity)

    def add_pixel_message(self, unary: Float[Tensor, "N L"], validity: Float[Tensor, " D"]) -> Float[Tensor, "N L"]:
        """`unary` (N, L) + pixel_message(validity)."""
        return torch.addmm(unary, self.foregrounds.T, self._push(validity))

    def _push(self, validity: Float[Tensor, " D"]) -> Float[Tensor, "D L"]:
        """(D, L) energy that each detection adds to its pixels."""
        push = self._kappa(self.weight_y) if self.form == "tied" else self.weight_x[self.labels] * self.scores
        energy = push * (1.0 - 2.0 * validity)
        per_label = torch.zeros(len(energy), len(self.weight_x), dtype=energy.dtype, device=energy.device)
        return per_label.scatter(1, self.labels[:, None], energy[:, None])

    def validity_logit(self, q: Float[Tensor, "N L"]) -> Float[Tensor, " D"]:
        """(D,) logit Q(Y_d = 1) given marginals `q` (N, L): unary plus agreement of F_d with l_d."""
        agreement = self._agreement(q)
        return self.unary_logit + self._kappa(self.weight_y) * (2.0 * agreement - self.foregrounds.sum(1))

    def expected_energy(self, q: Float[Tensor, "N L"], validity: Float[Tensor, " D"]) -> Float[Tensor, ""]:
        """E_Q of Eq. 2 summed over detections: the free energy's higher-order term.

        Raises:
            ValueError: If the form is not `tied`: the updates of the other descend no common energy.
        """
        require(self.form == "tied", "form", "'tied', whose updates descend this energy", repr(self.form))
        agreement = self._agreement(q)
        disagreement = self.foregrounds.sum(1) - agreement
        return (self._kappa(self.weight_y) * ((1.0 - validity) * agreement + validity * disagreement)).sum()

    def _agreement(self, q: Float[Tensor, "N L"]) -> Float[Tensor, " D"]:
        """(D,) S_d, the sum over F_d of Q_i(l_d)."""
        return (self.foregrounds @ q).gather(1, self.labels[:, None])[:, 0]

    def _kappa(self, weight: Float[Tensor, " L"]) -> Float[Tensor, " D"]:
        return weight[self.labels] * self.scores / self.foregrounds.sum(1).clamp(min=1.0)
