"""The network of Figure 2: semantic source -> higher-order CRF -> identification (Eq. 4) -> instance CRF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from instseg.config import ModelConfig
from instseg.crf.dense import HigherOrderCRF
from instseg.crf.identify import assign_naively, identify
from instseg.crf.instance import InstanceCRF
from instseg.crf.pairwise import Kernels, build_kernels
from instseg.models.semantic import build_semantic
from instseg.structures import Detections, InstanceMap, Sample


class NetworkOutput(NamedTuple):
    """What one image yields; everything is differentiable.

    Attributes:
        semantic_logits: (L, H, W) of the semantic source, before the CRF.
        log_q: (L, H, W) class log marginals after the semantic CRF.
        validity: (D,) Pr(Y_d = 1), the recalibrated scores; the detector's in the ablations that ignore Y.
        instance_log_q: (D+1, H, W) instance log marginals, 0 background, k = detection k-1.
    """

    semantic_logits: Tensor
    log_q: Tensor
    validity: Tensor
    instance_log_q: Tensor


class InstanceNetwork(nn.Module):
    """Instance segmentation of one image at a time, of any size and with any number of detections.

    Args:
        config: Semantic source, CRFs, ablation.
        num_labels: L, background included.
    """

    def __init__(self, config: ModelConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.num_labels = num_labels
        self.semantic = build_semantic(config.semantic, num_labels, config.semantic_weights)
        self.semantic_crf = HigherOrderCRF(num_labels, config.semantic_crf)
        self.instance_crf = InstanceCRF(config.instance_crf)

    def crf_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of both CRFs."""
        yield from self.semantic_crf.parameters()
        yield from self.instance_crf.parameters()

    def semantic_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the semantic network; none with precomputed logits."""
        if self.semantic is not None:
            yield from self.semantic.parameters()

    def forward(self, sample: Sample) -> NetworkOutput:
        """Run Figure 2 on one sample.

        Raises:
            ValueError: If the sample lacks what the configuration needs, or does not fit the label set.
        """
        height, width = sample.image.shape[:2]
        sample.detections.check_image(height, width, self.num_labels)
        image = self._tensor(sample.image)
        logits = self._semantic_logits(sample, image)
        kernels = build_kernels(image, self.config.semantic_crf.kernels)
        log_q, validity = self._semantic_crf(logits, kernels, sample.detections)

        labels = self._tensor(sample.detections.labels, torch.int64)
        boxes = self._tensor(sample.detections.box_masks(height, width), torch.bool).flatten(1)
        log_identity = identify(log_q.exp(), validity, labels, boxes, self.config.background)
        if self.config.instance_crf.kernels != self.config.semantic_crf.kernels:
            kernels = build_kernels(image, self.config.instance_crf.kernels)
        instance_log_q = (
            log_identity if self.config.ablation == "identification" else self.instance_crf(log_identity, kernels)
        )
        return NetworkOutput(
            logits,
            log_q.T.unflatten(1, (height, width)),
            validity,
            instance_log_q.T.unflatten(1, (height, width)),
        )

    def _semantic_logits(self, sample: Sample, image: Tensor) -> Tensor:
        """(L, H, W): the network's, or the sample's own brought to the image's size."""
        if self.semantic is not None:
            return self.semantic(image.permute(2, 0, 1))
        if sample.logits is None:
            raise ValueError(
                f"{sample.image_id}: the sample has no logits; prepare the data with --logits, or choose a semantic "
                "network with --model.semantic"
            )
        if len(sample.logits) != self.num_labels:
            raise ValueError(f"{sample.image_id}: logits: expected {self.num_labels} classes, got {len(sample.logits)}")
        logits = self._tensor(sample.logits)
        return interpolate(logits[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0]

    def _semantic_crf(self, logits: Tensor, kernels: Kernels, detections: Detections) -> tuple[Tensor, Tensor]:
        """Log Q (N, L) and the validity (D,) that identification uses, as the ablation asks."""
        flat = logits.flatten(1).T.contiguous()
        labels = self._tensor(detections.labels, torch.int64)
        scores = self._tensor(detections.scores)
        if self.config.ablation in ("identification", "no_detection_potentials"):
            return self.semantic_crf(flat, kernels, None).log_q, scores
        if detections.foregrounds is None:
            raise ValueError("detections: expected foregrounds, got None; compute them with compute_foregrounds")
        foregrounds = self._tensor(detections.foregrounds).flatten(1)
        potential = self.semantic_crf.potential(labels, scores, foregrounds)
        state = self.semantic_crf(flat, kernels, potential)
        return state.log_q, scores if self.config.ablation == "validity_ignored" else state.validity

    @torch.no_grad()
    def instance_map(self, output: NetworkOutput, sample: Sample) -> InstanceMap:
        """The final segmentation: every pixel's most likely instance, instances that win no pixel dropped.

        An instance has the class of its detection and is ranked by its validity or by the mean of Q_i(l_k) over its
        mask (ALGORITHM section 6), as `config.score` says.
        """
        semantic = output.log_q.argmax(0)
        detections = sample.detections
        labels = self._tensor(detections.labels, torch.int64)
        if self.config.ablation == "naive":
            boxes = self._tensor(detections.box_masks(*semantic.shape), torch.bool).flatten(1)
            winners = assign_naively(semantic.flatten(), output.validity, labels, boxes).view_as(semantic)
        else:
            winners = output.instance_log_q.argmax(0)
        present = winners.unique()
        present = present[present > 0]
        renumber = torch.zeros(len(detections) + 1, dtype=torch.int32, device=winners.device)
        renumber[present] = torch.arange(1, len(present) + 1, dtype=torch.int32, device=winners.device)
        kept = present - 1
        scores = output.validity[kept]
        if self.config.score == "mask":
            q = output.log_q.exp()
            means = [q[labels[index]][winners == index + 1].mean() for index in kept]
            scores = torch.stack(means) if means else scores
        return InstanceMap(
            instances=renumber[winners].cpu().numpy(),
            labels=labels[kept].cpu().numpy(),
            scores=scores.float().cpu().numpy(),
            detection_indices=kept.cpu().numpy(),
            semantic=semantic.to(torch.uint8).cpu().numpy(),
        )

    def _tensor(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """NumPy to torch, on the parameters' device and by default in their dtype: the one border between the two."""
        reference = self.instance_crf.spatial_weight
        return torch.from_numpy(np.ascontiguousarray(array)).to(reference.device, dtype or reference.dtype)


def segment_instances(
    image: np.ndarray,
    semantic_probabilities: np.ndarray,
    detections: Detections,
    config: ModelConfig | None = None,
) -> InstanceMap:
    """Instance masks from networks you already have: the whole method on one image, with hand-set parameters.

    Args:
        image: (H, W, 3) uint8 RGB.
        semantic_probabilities: (L, h, w) float, class probabilities of any semantic network at any resolution, class 0
            the background.
        detections: Any detector's detections; foregrounds are computed by GrabCut where they are None.
        config: CRF settings; `semantic` must stay "logits".

    Raises:
        ValueError: If shapes, classes or boxes do not fit each other, or probabilities are negative or not finite.
    """
    if semantic_probabilities.ndim != 3 or len(semantic_probabilities) < 2:
        shape = semantic_probabilities.shape
        raise ValueError(f"semantic_probabilities: expected shape (L, h, w) with L >= 2, got {shape}")
    if not np.isfinite(semantic_probabilities).all() or semantic_probabilities.min() < 0:
        raise ValueError("semantic_probabilities: expected finite values >= 0, got a negative, NaN or infinite one")
    num_labels = len(semantic_probabilities)
    height, width = image.shape[:2]
    detections.check_image(height, width, num_labels)
    if detections.foregrounds is None:
        from instseg.data.foreground import compute_foregrounds  # OpenCV, only where it is needed

        detections, _ = compute_foregrounds(image, detections, image_id="", num_iterations=5)
    logits = np.log(np.maximum(semantic_probabilities, 1e-12)).astype(np.float32)
    network = InstanceNetwork(replace(config or ModelConfig(), semantic="logits"), num_labels)
    sample = Sample(image_id="image", image=image, detections=detections, logits=logits)
    with torch.no_grad():
        return network.instance_map(network(sample), sample)
