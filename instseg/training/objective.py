"""What training minimises: the losses of samples, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from instseg.config import TrainConfig
from instseg.evaluation.matching import match_boxes
from instseg.models.network import InstanceNetwork
from instseg.models.semantic import normalize
from instseg.structures import Sample
from instseg.training.detection_loss import detection_loss, jitter_boxes
from instseg.training.losses import instance_loss, semantic_loss


class Objective(nn.Module):
    """The losses of samples. This is what DDP wraps, so that forward and loss are one graph to it.

    Args:
        network: The network to train.
        config: Which parts take part, and the weights of their losses.
    """

    def __init__(self, network: InstanceNetwork, config: TrainConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(
        self, samples: Sequence[Sample], seeds: Sequence[int], head_only: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total of each sample, and the losses that it is made of by name.

        Samples of one size pass the semantic network together, others one by one; the CRFs take one at a time.

        Args:
            samples: B of them, with ground truth.
            seeds: Of what is drawn for each sample; dropout of those that go together has the first one's.
            head_only: Leave the CRFs out: they take most of the time, and the detection head needs many epochs.

        Returns:
            (B,) the totals, to be averaged, and (B,) each loss.
        """
        torch.manual_seed(seeds[0])
        together = self._logits_of_all(samples) if len(samples) > 1 and not head_only else None
        rows = []
        for index, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
            torch.manual_seed(seed)
            logits = None if together is None else together[index]
            rows.append(self._head_loss(sample) if head_only else self._losses(sample, logits))
        losses = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        weights = {"semantic_loss": self.config.semantic_loss_weight, "instance_loss": self.config.instance_loss_weight}
        totals = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum(0)
        # What an ablation or the first epochs leave out is not in the graph; DDP waits for every parameter's gradient.
        # A semantic network is in it after them, and too large to be summed at each step for nothing.
        network = self.network
        absent = network.parameters() if head_only else (*network.crf_parameters(), *network.head_parameters())
        return totals + 0 * sum(p.sum() for p in absent if p.requires_grad), losses

    def _head_loss(self, sample: Sample) -> dict[str, Tensor]:
        with torch.no_grad():  # the semantic network's rate is 0 in these epochs
            logits = self._logits(sample)
        matches = _matches(sample)
        jittered = replace(sample, detections=jitter_boxes(sample.detections, *sample.image.shape[:2]))
        seen = self.network.see_detections(jittered, logits, matches >= 0)
        return {"detection_loss": detection_loss(seen, jittered.detections, matches, sample.known_instances)}

    def _losses(self, sample: Sample, logits: Tensor | None) -> dict[str, Tensor]:
        config, floor = self.config, self.config.probability_floor
        logits = self._logits(sample) if logits is None else logits
        if config.train_through == "network":
            return {"semantic_loss": semantic_loss(logits.log_softmax(0), sample.semantic, floor)}
        ablation = config.ablation
        if config.train_through == "semantic_crf":
            ablation = replace(ablation, identification=False, instance_crf=False)
        output = self.network(sample, ablation, logits)
        labels, truth = sample.detections.labels, (sample.known_instances, sample.instance_labels)
        losses = {"semantic_loss": semantic_loss(output.log_q, sample.semantic, floor)}
        if config.train_through == "instance_crf":
            kind = config.instance_loss
            losses["instance_loss"] = instance_loss(output.instance_log_q, labels, *truth, kind, floor)
        if (seen := output.detections.seen) is not None:
            losses["detection_loss"] = detection_loss(seen, sample.detections, _matches(sample), truth[0])
        return losses

    def _logits(self, sample: Sample) -> Tensor:
        """(L, H, W) float32, of the sample or of the semantic network."""
        with self._autocast():
            return self.network.semantic_logits(sample).float()

    def _logits_of_all(self, samples: Sequence[Sample]) -> Tensor | None:
        """(B, L, H, W) float32 of the semantic network; None if there is none, or the sizes differ."""
        semantic = self.network.semantic
        if semantic is None or len({sample.image.shape for sample in samples}) > 1:
            return None
        device = next(semantic.parameters()).device
        images = [torch.from_numpy(sample.image).to(device).permute(2, 0, 1) for sample in samples]
        with self._autocast():
            return semantic.body(torch.stack([normalize(image) for image in images])).float()

    def _autocast(self) -> torch.autocast:
        """The precision of the semantic network; the CRFs' sums over an image need float32."""
        device = next(self.network.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")


def _matches(sample: Sample) -> np.ndarray:
    """(D,) index of the instance that each detection has found, or -1."""
    if (truth := sample.known_instances) is None:
        return np.full(len(sample.detections), -1)
    return match_boxes(sample.detections, truth, sample.instance_labels)
