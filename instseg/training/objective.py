"""What training minimises: the losses of one sample, and their weighted sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from instseg.config import TrainConfig
from instseg.evaluation.matching import match_boxes
from instseg.models.network import InstanceNetwork
from instseg.structures import Sample
from instseg.training.detection_loss import detection_loss, jitter_boxes
from instseg.training.losses import instance_loss, semantic_loss


class Objective(nn.Module):
    """The losses of one sample. This is what DDP wraps, so that forward and loss are one graph to it.

    Args:
        network: The network to train.
        config: Weights of the losses.
    """

    def __init__(self, network: InstanceNetwork, config: TrainConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, sample: Sample, head_only: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and the losses that it is made of by name, scalars.

        Args:
            sample: With ground truth.
            head_only: Leave the CRFs out: they take most of the time, and the detection head needs many epochs.
        """
        losses = self._head_loss(sample) if head_only else self._losses(sample)
        weights = {"semantic_loss": self.config.semantic_loss_weight, "instance_loss": self.config.instance_loss_weight}
        total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        # What an ablation or the first epochs leave out is not in the graph; DDP waits for every parameter's gradient.
        # A semantic network is in it after them, and too large to be summed at each step for nothing.
        network = self.network
        absent = network.parameters() if head_only else (*network.crf_parameters(), *network.head_parameters())
        return total + 0 * torch.stack([p.sum() for p in absent]).sum(), losses

    def _head_loss(self, sample: Sample) -> dict[str, Tensor]:
        with torch.no_grad():  # the semantic network's rate is 0 in these epochs
            logits = self.network.semantic_logits(sample)
        matches = _matches(sample)
        jittered = replace(sample, detections=jitter_boxes(sample.detections, *sample.image.shape[:2]))
        seen = self.network.see_detections(jittered, logits, matches >= 0)
        return {"detection_loss": detection_loss(seen, jittered.detections, matches, sample.known_instances)}

    def _losses(self, sample: Sample) -> dict[str, Tensor]:
        config, output = self.config, self.network(sample, self.config.ablation)
        labels, truth = sample.detections.labels, (sample.known_instances, sample.instance_labels)
        floor = config.probability_floor
        losses = {
            "semantic_loss": semantic_loss(output.log_q, sample.semantic, floor),
            "instance_loss": instance_loss(output.instance_log_q, labels, *truth, config.instance_loss, floor),
        }
        if (seen := output.detections.seen) is not None:
            losses["detection_loss"] = detection_loss(seen, sample.detections, _matches(sample), truth[0])
        return losses


def _matches(sample: Sample) -> np.ndarray:
    """(D,) index of the instance that each detection has found, or -1."""
    if (truth := sample.known_instances) is None:
        return np.full(len(sample.detections), -1)
    return match_boxes(sample.detections, truth, sample.instance_labels)
