"""The tests check the shapes in annotations: calls that would broadcast or index in silence fail instead."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch

from instseg.crf.detection import DetectionPotential
from instseg.crf.identify import identify
from instseg.evaluation.semantic import label_iou
from instseg.lattice import torch_backend
from instseg.models.semantic import normalize

LABELS, VALIDITY, BOXES = torch.tensor([1, 2]), torch.tensor([0.5, 0.6]), torch.ones(2, 6, dtype=torch.bool)


def test_wrong_shapes_are_caught():
    assert identify(torch.full((6, 3), 1 / 3), VALIDITY, LABELS, BOXES).shape == (6, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        identify(torch.full((1, 3), 1 / 3), VALIDITY, LABELS, BOXES)  # would broadcast to 6 pixels
    with pytest.raises(jaxtyping.TypeCheckError):
        identify(torch.full((6, 3), 1 / 3), VALIDITY[:1], LABELS, BOXES)  # and to 2 detections


def test_wrong_fields_and_other_parts_are_caught():
    weight = torch.ones(3)
    with pytest.raises(jaxtyping.TypeCheckError):
        DetectionPotential(LABELS, VALIDITY[:1], torch.ones(2, 6), weight, weight)
    with pytest.raises(jaxtyping.TypeCheckError):
        torch_backend.softmax_backward(torch.ones(6, 3), torch.ones(1, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        normalize(torch.zeros(4, 5, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        label_iou(np.zeros((2, 3), np.int64))


@pytest.mark.usefixtures("without_shape_checks")
def test_the_checks_can_be_left_out():
    assert identify(torch.full((1, 3), 1 / 3), VALIDITY, LABELS, BOXES).shape == (6, 3)
