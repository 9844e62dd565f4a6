"""Records as this process computes them image by image, to compare with those of actors."""

from __future__ import annotations

import torch

from instseg.config import Ablation
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.models.network import InstanceNetwork


@torch.inference_mode()
def records_alone(network: InstanceNetwork, dataset: PreparedDataset, ablation: Ablation) -> list[ImageRecord]:
    """In the order of the data set."""
    network.eval()
    return [_record(network, dataset, index, ablation) for index in range(len(dataset))]


def _record(network: InstanceNetwork, dataset: PreparedDataset, index: int, ablation: Ablation) -> ImageRecord:
    output = network(dataset[index], ablation)
    before = output.semantic_logits.argmax(0).numpy()
    predicted, validity = network.instance_map(output, ablation), output.validity.numpy()
    return image_record(dataset[index], predicted, before, dataset.num_labels, validity)
