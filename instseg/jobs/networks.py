"""The networks that run on the photographs: a detector and a semantic network, and the rest of Figure 2."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from instseg.config import ModelConfig, PredictConfig, ShardsConfig
from instseg.data.files import sha256_of
from instseg.data.stages import Draft, detect, predict, segment
from instseg.jobs.cluster import cluster_nodes
from instseg.storage import StoragePath

if TYPE_CHECKING:
    from instseg.models.network import InstanceNetwork


class Detect:
    """Ray Data's stage of the detector.

    Args:
        config: The options of prepare or predict, with a detector.
        classes: Class names of the data, [0] is background.
        device: "cpu" or "cuda".

    Raises:
        FileNotFoundError: If its weights are missing.
        ValueError: If there is no such detector, or it has other classes.
    """

    def __init__(self, config: ShardsConfig, classes: tuple[str, ...], device: str) -> None:
        from instseg.models.detectors import Detector

        assert config.detector is not None  # for type checkers
        _one_thread()
        weights = config.detector_weights
        self.detector = Detector(config.detector, classes, weights, config.nms_iou, config.min_score).to(device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Put its detections into a draft."""
        return detect(Draft.decode(row), self.detector).encode()


class Segment:
    """Ray Data's stage of the semantic network; as `Detect`."""

    def __init__(self, config: ShardsConfig, classes: tuple[str, ...], device: str) -> None:
        from instseg.models.open import open_semantic

        assert config.semantic is not None  # for type checkers
        _one_thread()
        network = open_semantic(config.semantic, classes, _semantic_weights(config))
        self.network = network.to(device).eval()
        self.device = device

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Put its logits into a draft."""
        return segment(Draft.decode(row), self._logits).encode()

    def _logits(self, image: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            planes = torch.from_numpy(image).permute(2, 0, 1).to(self.device)
            return self.network.coarse_logits(planes).cpu().numpy()


class Predict:
    """Ray Data's stage of the network of Figure 2; as `Detect`."""

    def __init__(self, config: PredictConfig, classes: tuple[str, ...], device: str) -> None:
        _one_thread()
        self.network = open_network(config, classes).to(device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Put its instances into a draft."""
        import torch

        with torch.inference_mode():
            return predict(Draft.decode(row), lambda sample: self.network.instance_map(self.network(sample))).encode()


Stage = type[Detect] | type[Segment] | type[Predict]


def open_network(config: PredictConfig, classes: tuple[str, ...]) -> InstanceNetwork:
    """The checkpoint's network, or the one with hand-set weights, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it was trained with other classes.
    """
    from instseg.models.checkpoint import check_classes, find_checkpoint
    from instseg.models.network import InstanceNetwork

    if config.checkpoint is None:
        return InstanceNetwork(ModelConfig(), len(classes)).eval()
    checkpoint = find_checkpoint(config.checkpoint)
    check_classes(checkpoint, classes)
    return InstanceNetwork.load(checkpoint.folder, num_labels=len(classes))


def stages_of(config: ShardsConfig) -> tuple[type[Detect] | type[Segment], ...]:
    """The networks that the options name, in the order in which they run."""
    asked = ((config.detector, Detect), (config.semantic, Segment))
    return tuple(stage for name, stage in asked if name is not None)


@functools.cache
def _loaded(stage: Stage, config: Any, classes: tuple[str, ...]) -> Detect | Segment | Predict:
    """A stage on the CPU, once a process."""
    return stage(config, classes, "cpu")


def describe_networks(config: ShardsConfig) -> dict[str, Any]:
    """JSON values that the networks' outputs depend on: names, options, and the content of what lies in files."""
    described: dict[str, Any] = {}
    if config.detector is not None:
        weights = _content(config.detector_weights)
        described["detector"] = {"name": config.detector, "weights": weights, "nms_iou": config.nms_iou}
    if config.semantic is not None:
        described["semantic"] = {"name": _content(config.semantic), "weights": _content(_semantic_weights(config))}
    return described


def _semantic_weights(config: ShardsConfig) -> str | None:
    """A network that is named has torchvision's weights unless others are; one that was trained here has its own."""
    trained = config.semantic is not None and StoragePath.of(config.semantic).is_folder()
    return config.semantic_weights or (None if trained else "default")


def _content(name: str | None) -> str | None:
    """The hash of a file, of a checkpoint's weights, or what is the name of neither."""
    if name is None:
        return None
    place = StoragePath.of(name)
    if place.is_folder():
        from instseg.models.checkpoint import find_checkpoint

        return sha256_of(find_checkpoint(place).folder / "model.safetensors")
    return name if place.size() is None else sha256_of(place)


def through_networks(
    rows: Any, networks: Sequence[Stage], config: ShardsConfig, classes: tuple[str, ...], num_others: int = 0
) -> Any:
    """Drafts as Ray Data has them, sent through networks: actors that share the GPUs, or in the tasks of the CPUs.

    The GPUs are shared with `num_others` networks more.

    Raises:
        ValueError: If GPUs are asked for and there is none.
    """
    import ray.data

    num_gpus = sum(node.gpus for node in cluster_nodes())
    if config.device == "gpu" and not num_gpus:
        raise ValueError("device: expected a cluster with GPUs, got one without; use --device cpu")
    for network in networks:
        if num_gpus and config.device != "cpu":
            rows = rows.map(
                network,
                fn_constructor_args=(config, classes, "cuda"),
                compute=ray.data.ActorPoolStrategy(size=num_gpus),
                num_gpus=1 / (len(networks) + num_others),
                num_cpus=0,  # the CPUs are for what comes before and after, even if there is one
            )
        else:
            rows = rows.map(functools.partial(_on_cpu, network, config, classes), num_cpus=1)
    return rows


def _on_cpu(network: Stage, config: ShardsConfig, classes: tuple[str, ...], row: dict[str, Any]) -> dict[str, Any]:
    return row if Draft.decode(row).kept else _loaded(network, config, classes)(row)


def _one_thread() -> None:
    """Ray runs a task on each CPU already; and sums would differ by the number of threads."""
    import torch

    torch.set_num_threads(1)
