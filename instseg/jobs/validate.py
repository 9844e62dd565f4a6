"""Measure a checkpoint on prepared data: scores, the same images at every validation, the CRFs' parameters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from instseg.config import ModelConfig, ValidationConfig
from instseg.crf.higher_order import HigherOrderCRF
from instseg.crf.instance import InstanceCRF
from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.models.checkpoint import Checkpoint, check_classes, find_checkpoint, from_json
from instseg.models.network import InstanceNetwork
from instseg.report.crf_parameters import CrfParameters, save_crf_parameters
from instseg.report.pictures import save_panel
from instseg.report.tables import Evaluation
from instseg.storage import Place
from instseg.structures import InstanceMap, Sample

# What a validation measures, in percent, by the names that `Evaluation.metrics` has for it.
METRICS = {
    "ap_r_vol": "ap_r_vol",
    "ap_r_0.5": "ap_r_0.5",
    "ap_r_0.7": "ap_r_0.7",
    "mean_iou": "mean_iou_after",
    "mean_iou_before": "mean_iou_before",  # of the semantic network alone
    "ece": "validity/ece",  # expected calibration error of Pr(Y_d = 1)
    "detector_ece": "detector_score/ece",
}


def validate(
    checkpoint: Place, config: ValidationConfig, panels: Place | None = None, parameters: Place | None = None
) -> dict[str, float]:
    """Run a checkpoint's network on the validation images, one after the other in this process, and score it.

    Args:
        checkpoint: Its folder.
        config: Which images, and how many are drawn.
        panels: PNG to write, of the images with the most classes, which are the same every time.
        parameters: PNG to write, of the CRFs' parameters.

    Returns:
        `METRICS`, in percent; NaN without detections or true instances.

    Raises:
        FileNotFoundError: If the checkpoint or the data is missing or incomplete.
        ValueError: If one of them is damaged, or they do not fit each other.
    """
    torch.set_num_threads(config.num_cpus)
    dataset, opened = validation_images(config), find_checkpoint(checkpoint)
    check_classes(opened, dataset.classes)
    network = InstanceNetwork.load(opened.folder, num_labels=dataset.num_labels)
    records = list(_records(network, dataset))
    if panels is not None and config.num_panels:
        chosen = informative(records, dataset.image_ids, config.num_panels)
        samples = [dataset[index] for index in chosen]
        save_panel(panels, samples, [_segment(network, sample)[0] for sample in samples], dataset.classes)
    if parameters is not None:
        title = f"{opened.folder.name}, step {opened.state.get('step', 0)}"
        save_crf_parameters(parameters, *crf_parameters(opened, network), dataset.classes, title)
    values = Evaluation.of(records, dataset.classes).metrics()
    return {name: values[source] for name, source in METRICS.items()}


def validation_images(config: ValidationConfig) -> PreparedDataset:
    """The images of a validation, the same every time: all, or `num_images` in even steps through their sorted ids.

    Raises:
        FileNotFoundError: If there is no prepared data.
        ValueError: If none was given, it has no image, or its manifest is damaged.
    """
    if config.data is None:
        raise ValueError("validation.data: expected a directory that prepare.py wrote, got None")
    dataset = PreparedDataset(config.data)
    if not len(dataset):
        raise ValueError(f"validation.data {config.data}: has no images")
    num = min(config.num_images or len(dataset), len(dataset))
    return dataset.subset(index * len(dataset) // num for index in range(num))


def informative(records: list[ImageRecord], image_ids: tuple[str, ...], num: int) -> list[int]:
    """Indices of the images with the most true classes, then the most true instances."""
    ranked = sorted(
        records, key=lambda record: (-len(set(record.truth_labels)), -len(record.truth_labels), record.image_id)
    )
    return [image_ids.index(record.image_id) for record in ranked[:num]]


def crf_parameters(checkpoint: Checkpoint, network: InstanceNetwork) -> tuple[CrfParameters, CrfParameters]:
    """The CRFs' parameters as they are, and as the checkpoint's configuration says that they were in the beginning."""
    model = from_json(ModelConfig, checkpoint.config["model"])
    before = HigherOrderCRF(network.num_labels, model.semantic_crf), InstanceCRF(model.instance_crf)
    return _parameters(network.semantic_crf, network.instance_crf), _parameters(*before)


def _parameters(semantic: HigherOrderCRF, instance: InstanceCRF) -> CrfParameters:
    return CrfParameters(
        detection_weight_x=_array(semantic.detection_weight_x),
        detection_weight_y=_array(semantic.detection_weight_y),
        spatial_weight=_array(semantic.dense.spatial_weight),
        bilateral_weight=_array(semantic.dense.bilateral_weight),
        compatibility=_array(semantic.dense.compatibility),
        instance_weights=(instance.spatial_weight.item(), instance.bilateral_weight.item()),
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _records(network: InstanceNetwork, dataset: PreparedDataset) -> Iterator[ImageRecord]:
    for sample in read_ahead(dataset.__getitem__, range(len(dataset))):
        predicted, semantic_before, validity = _segment(network, sample)
        yield image_record(sample, predicted, semantic_before, network.num_labels, validity)


@torch.inference_mode()
def _segment(network: InstanceNetwork, sample: Sample) -> tuple[InstanceMap, np.ndarray, np.ndarray]:
    """The instances, the (H, W) semantic segmentation before the CRF, and Pr(Y_d = 1)."""
    output = network(sample)
    return network.instance_map(output), output.semantic_logits.argmax(0).cpu().numpy(), output.validity.cpu().numpy()
