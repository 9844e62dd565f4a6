"""Every potential against enumeration: 4 pixels x 3 labels x 2 detections, latent Y included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from instseg.crf.detection import DetectionPotential
from instseg.crf.mean_field import MeanFieldState, PairwiseTerm, free_energy, mean_field, mean_field_step
from instseg.crf.pairwise import message_matrices, potts
from tests.oracles import DenseKernels, TinyCRF, gaussian_kernel

SCORES, LABELS, WEIGHTS = (0.7, 0.4), (1, 2), (0.0, 3.0, 2.0)
FOREGROUNDS = ([0, 1, 2], [2, 3])


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    unary = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    features = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    kernel = 0.8 * gaussian_kernel(features).fill_diagonal_(0.0)
    compatibility = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.7], [0.5, 0.7, 0.1]], dtype=torch.float64)
    q = torch.randn(4, 3, generator=generator, dtype=torch.float64).softmax(1)
    validity = torch.tensor([0.3, 0.9], dtype=torch.float64)
    return unary, kernel, compatibility, q, validity


def potential(form: Any = "tied", unary: Any = "logit", **changes) -> DetectionPotential:
    foregrounds = torch.zeros(2, 4, dtype=torch.float64)
    for row, pixels in zip(foregrounds, FOREGROUNDS, strict=True):
        row[pixels] = 1.0
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    arguments = {"weight_x": weights, "weight_y": weights} | changes
    scores = torch.tensor(SCORES, dtype=torch.float64)
    return DetectionPotential(torch.tensor(LABELS), scores, foregrounds, form=form, unary=unary, **arguments)


def oracle(problem, unary="logit") -> TinyCRF:
    """Psi_U as ALGORITHM section 2 has it: -ln s, -ln(1-s), or log-potentials (1-p, p)."""
    detections = []
    for label, score, pixels in zip(LABELS, SCORES, FOREGROUNDS, strict=True):
        s = torch.tensor(score, dtype=torch.float64)
        unary_0, unary_1 = (-torch.log(1 - s), -torch.log(s)) if unary == "logit" else (-(1 - s), -s)
        detections.append((label, WEIGHTS[label] * score, pixels, float(unary_0), float(unary_1)))
    return TinyCRF(problem[0], problem[1], problem[2], detections)


def pairwise(problem):
    _, kernel, compatibility, _, _ = problem
    return term(kernel, torch.ones(3, dtype=torch.float64), compatibility)


def term(kernel, weight, compatibility) -> PairwiseTerm:
    return PairwiseTerm(DenseKernels([kernel]), message_matrices([weight], compatibility))


def centered(messages: torch.Tensor) -> torch.Tensor:
    """A message counts up to a constant in l."""
    return messages - messages.mean(1, keepdim=True)


@pytest.mark.parametrize("unary_form", ["logit", "linear"])
def test_messages_are_gradients_of_the_expected_energy(problem, unary_form):
    unary, _, _, q, validity = problem
    q, validity = q.clone().requires_grad_(), validity.clone().requires_grad_()
    oracle(problem, unary_form).expected_energy(q, validity).backward()
    detections = potential(unary=unary_form)
    with torch.no_grad():
        message = unary + pairwise(problem).message(q) + detections.pixel_message(validity)
        torch.testing.assert_close(centered(message), centered(q.grad), rtol=0, atol=1e-12)
        torch.testing.assert_close(detections.validity_logit(q), -validity.grad, rtol=0, atol=1e-12)


def test_class_specific_weights_and_potts_match_the_written_out_sum(problem):
    _, kernel, _, q, _ = problem
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    message = term(kernel, weight, potts(3, weight)).message(q)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        for l in range(3):  # noqa: E741
            for other in range(3):
                if other != l:
                    expected[i, l] += weight[other] * (kernel[i] * q[:, other]).sum()
    torch.testing.assert_close(message, expected, rtol=0, atol=1e-12)


def test_step_minimises_the_kl_divergence_in_each_block(problem):
    """The step's pixels are the minimiser of KL(Q||P) given the rest: no perturbation of one pixel or Y gets below."""
    unary, _, _, q, validity = problem
    crf, detections = oracle(problem), potential()

    def kl(q, validity):
        entropy = -(q * q.log()).sum() - (validity * validity.log() + (1 - validity) * (1 - validity).log()).sum()
        return crf.expected_energy(q, validity) - entropy + crf.log_z()

    step = mean_field_step(q, validity, unary, pairwise(problem), detections)
    assert step.validity is not None
    for d in range(2):
        best = validity.clone()
        best[d] = step.validity[d]
        for shift in (-1e-3, 1e-3):
            worse = best.clone()
            worse[d] += shift
            assert kl(q, best) < kl(q, worse)
    for i in range(4):
        best = q.clone()
        best[i] = step.log_q[i].exp()
        for a, b in ((0, 1), (1, 2), (2, 0)):
            worse = best.clone()
            worse[i, a] += 1e-4
            worse[i, b] -= 1e-4
            assert kl(best, validity) < kl(worse, validity)
    assert kl(q, validity) > 0


@pytest.mark.parametrize("unary_form", ["logit", "linear"])
def test_free_energy_is_kl_up_to_the_partition_function(problem, unary_form):
    unary, _, _, q, validity = problem
    crf, detections = oracle(problem, unary_form), potential(unary=unary_form)
    entropy = -(q * q.log()).sum() - (validity * validity.log() + (1 - validity) * (1 - validity).log()).sum()
    expected = crf.expected_energy(q, validity) - entropy
    got = free_energy(MeanFieldState(-q.log(), validity), unary, pairwise(problem), detections)
    # the linear form's log-potentials are not normalised: they differ from the free energy's by a constant
    offset = torch.zeros((), dtype=torch.float64)
    if unary_form == "linear":
        for s in torch.tensor(SCORES, dtype=torch.float64):
            offset = offset - torch.logsumexp(torch.stack([s, 1 - s]), 0)
    torch.testing.assert_close(got, expected - offset, rtol=0, atol=1e-12)


def test_the_decoupled_form_has_no_free_energy(problem):
    unary, _, _, q, validity = problem
    with pytest.raises(ValueError, match=r"form: expected 'tied', .* got 'decoupled'"):
        free_energy(MeanFieldState(-q.log(), validity), unary, pairwise(problem), potential("decoupled"))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "tide"}, r"form: expected one of decoupled, tied, got 'tide'; did you mean 'tied'\?"),
        ({"unary": "logits"}, r"unary: expected one of logit, linear, got 'logits'; did you mean 'logit'\?"),
    ],
)
def test_unknown_forms_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        potential(**arguments)


def test_a_negative_number_of_iterations_is_refused(problem):
    with pytest.raises(ValueError, match="num_iterations: expected a value >= 0, got -3"):
        mean_field(problem[0], pairwise(problem), potential(), num_iterations=-3)


def test_decoupled_form_weights_pixels_and_y_apart(problem):
    """Pixels move by w_x s_d without 1/|F_d|, Y by w_y s_d / |F_d|: tied potentials with other weights."""
    _, _, _, q, validity = problem
    weight_x = torch.tensor([0.0, 5.0, 7.0], dtype=torch.float64)
    decoupled = potential("decoupled", weight_x=weight_x)
    message = decoupled.pixel_message(validity)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for label, score, pixels, y in zip(LABELS, SCORES, FOREGROUNDS, validity, strict=True):
        for i in pixels:
            expected[i, label] += weight_x[label] * score * (1 - 2 * y)
    torch.testing.assert_close(message, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(decoupled.validity_logit(q), potential().validity_logit(q))


def test_initial_validity_is_the_score_and_a_score_of_one_stays_finite(problem):
    detections = replace(potential(), scores=torch.tensor([1.0, 0.4]).double())
    state = mean_field(problem[0], pairwise(problem), detections, num_iterations=0)
    torch.testing.assert_close(state.validity, torch.tensor([1 - 1e-4, 0.4]).double())
    assert torch.isfinite(detections.unary_logit).all()


def test_empty_foreground_takes_no_part():
    base = potential("decoupled")
    foregrounds = base.foregrounds.clone()
    foregrounds[1] = 0.0
    empty = DetectionPotential(base.labels, base.scores, foregrounds, base.weight_x, base.weight_y)
    alone = DetectionPotential(base.labels[:1], base.scores[:1], foregrounds[:1], base.weight_x, base.weight_y)
    validity = torch.tensor([0.9, 0.9], dtype=torch.float64)
    torch.testing.assert_close(empty.pixel_message(validity), alone.pixel_message(validity[:1]))
    q = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(empty.validity_logit(q)[1], torch.logit(torch.tensor(0.4, dtype=torch.float64)))
