"""The instance CRF: permutation of detections, a batch of images with any numbers of detections, bad input."""

from __future__ import annotations

import pytest
import torch

from instseg.config import InstanceCrfConfig
from instseg.crf.instance import InstanceCRF
from instseg.crf.pairwise import build_kernels

SIZES = [(12, 17, 0), (9, 8, 3), (1, 1, 8), (20, 15, 7), (11, 13, 30), (16, 10, 12)]  # height, width, detections


def scene(height: int, width: int, num_detections: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An image, and random unaries."""
    generator = torch.Generator().manual_seed(seed + height)
    image = 255 * torch.rand(height, width, 3, generator=generator)
    logits = 3 * torch.randn(height * width, num_detections + 1, generator=generator)
    return image, -logits.log_softmax(1)


def test_order_of_detections_does_not_matter():
    crf = InstanceCRF(InstanceCrfConfig())
    image, unary = scene(14, 18, 6)
    order = torch.tensor([0, 4, 6, 1, 5, 2, 3])
    kernels = build_kernels(image, crf.config.kernels)
    with torch.no_grad():
        torch.testing.assert_close(crf(unary[:, order], kernels), crf(unary, kernels)[:, order])


def test_a_batch_is_its_images_and_so_are_its_gradients():
    """From no detection, where background is all there is, to thirty."""
    crf = InstanceCRF(InstanceCrfConfig())
    images, unaries = zip(*(scene(*size) for size in SIZES), strict=True)
    results = []
    for together in (True, False):
        inputs = [values.clone().requires_grad_() for values in unaries]
        if together:
            outputs = crf.batch(images, inputs)
        else:
            outputs = [crf(v, build_kernels(i, crf.config.kernels)) for i, v in zip(images, inputs, strict=True)]
        total = torch.cat([(log_q.exp() ** 2).flatten() for log_q in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(total, [*inputs, *crf.parameters()])])
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("drop_image", "rows", "message"), [(True, 6, "one unary for each of 1"), (False, 5, r"\(6, D\+1\)")]
)
def test_bad_batch(drop_image, rows, message):
    images = [torch.zeros(2, 3, 3)] * (1 if drop_image else 2)
    with pytest.raises(ValueError, match=message):
        InstanceCRF(InstanceCrfConfig()).batch(images, [torch.zeros(6, 2), torch.zeros(rows, 2)])
