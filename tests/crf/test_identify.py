"""Eq. 4 against a pixel-by-pixel transcription, and its invariants."""

from __future__ import annotations

import pytest
import torch

from instseg.crf.identify import EPSILON, assign_naively, identify, identify_by_foreground


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(12, 4, generator=generator, dtype=torch.float64).softmax(1)
    validity = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64)
    boxes = torch.rand(3, 12, generator=generator) < 0.5
    boxes[:, 0] = False
    boxes[:, 1] = True
    return q, validity, torch.tensor([1, 1, 3]), boxes


def transcription(q, validity, labels, boxes, background):
    expected = torch.zeros(len(q), len(labels) + 1, dtype=torch.float64)
    for i in range(len(q)):
        covering = [k for k in range(len(labels)) if boxes[k, i]]
        if not covering:
            expected[i, 0] = 1.0
            continue
        for k in covering:
            expected[i, k + 1] = q[i, labels[k]] * validity[k]
        if background == "rescored":
            expected[i, 0] = q[i, 0] * max(validity[k] for k in covering)
        expected[i] /= expected[i].sum()
    return torch.log(expected + EPSILON)


@pytest.mark.parametrize("background", ["rescored", "literal"])
def test_equals_the_equation(inputs, background):
    q, validity, labels, boxes = inputs
    expected = transcription(q, validity, labels, boxes, background)
    torch.testing.assert_close(identify(q, validity, labels, boxes, background), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_form_of_the_background_is_refused(inputs):
    with pytest.raises(ValueError, match=r"background: .* got 'rescoerd'; did you mean 'rescored'\?"):
        identify(*inputs, background="rescoerd")  # pyright: ignore[reportArgumentType]


def test_detection_order_permutes_the_channels(inputs):
    q, validity, labels, boxes = inputs
    order = torch.tensor([2, 0, 1])
    permuted = identify(q, validity[order], labels[order], boxes[order])
    torch.testing.assert_close(permuted[:, 1:], identify(*inputs)[:, 1:][:, order])
    torch.testing.assert_close(permuted[:, 0], identify(*inputs)[:, 0])


def test_gradcheck_into_q_and_validity(inputs):
    q, validity, labels, boxes = inputs
    assert torch.autograd.gradcheck(
        lambda q, v: identify(q, v, labels, boxes), (q.clone().requires_grad_(), validity.clone().requires_grad_())
    )


def test_no_detections_is_all_background():
    q = torch.rand(5, 3).softmax(1).requires_grad_()
    result = identify(q, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.bool))
    assert result.shape == (5, 1)
    torch.testing.assert_close(result, torch.zeros(5, 1))


def test_naive_assignment_gives_overlaps_to_the_highest_score():
    classes = torch.tensor([0, 1, 1, 2, 1])
    boxes = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    assigned = assign_naively(classes, torch.tensor([0.3, 0.8]), torch.tensor([1, 1]), boxes)
    assert assigned.tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize("map_weight", [0.0, 0.3, 1.0])
def test_foregrounds_in_the_place_of_boxes(inputs, map_weight):
    q, validity, labels, boxes = inputs
    shapes = boxes * torch.rand(boxes.shape, dtype=torch.float64)
    expected = torch.zeros(len(q), len(labels) + 1, dtype=torch.float64)
    for i in range(len(q)):
        reaching = [k for k in range(len(labels)) if shapes[k, i] > 0]
        expected[i, 0] = 1.0
        if reaching:
            farthest = max(shapes[k, i] for k in reaching)
            expected[i, 0] = q[i, 0] ** map_weight * max(validity[k] for k in reaching) * (1 - farthest)
        for k in reaching:
            expected[i, k + 1] = q[i, labels[k]] ** map_weight * validity[k] * shapes[k, i]
        expected[i] /= expected[i].sum()
    log_pr = identify_by_foreground(q, validity, labels, shapes, map_weight)
    torch.testing.assert_close(log_pr.exp(), expected, rtol=0, atol=1e-7)


def test_gradcheck_into_q_validity_and_foregrounds(inputs):
    q, validity, labels, boxes = inputs
    shapes = 0.8 * boxes[:, 1:] * torch.rand(3, 11, dtype=torch.float64)
    variables = [tensor.clone().requires_grad_() for tensor in (q[1:], validity)]
    assert torch.autograd.gradcheck(lambda q, v: identify_by_foreground(q, v, labels, shapes, 0.3), variables)
    shapes = (0.1 + shapes).requires_grad_()  # positive, as its derivative at 0 is one-sided
    assert torch.autograd.gradcheck(lambda s: identify_by_foreground(q[1:], validity, labels, s, 0.3), [shapes])


def test_no_detections_is_all_background_with_foregrounds_too():
    q = torch.rand(5, 3).softmax(1).requires_grad_()
    result = identify_by_foreground(q, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5), 0.1)
    torch.testing.assert_close(result, torch.zeros(5, 1))
    result.sum().backward()  # every parameter stays in the graph
