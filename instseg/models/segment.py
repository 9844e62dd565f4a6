"""The whole method on one image, from outputs of networks that you already have."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from instseg.checks import array, require
from instseg.config import ModelConfig
from instseg.models.network import InstanceNetwork
from instseg.models.semantic import LOGITS
from instseg.structures import Detections, InstanceMap


def segment_instances(
    image: np.ndarray,
    semantic_probabilities: np.ndarray,
    detections: Detections,
    network: InstanceNetwork | None = None,
    config: ModelConfig | None = None,
) -> InstanceMap:
    """Instance masks from a semantic network's and a detector's outputs.

    Args:
        image: (H, W, 3) uint8 RGB.
        semantic_probabilities: (L, h, w) float, class probabilities of any semantic network at any resolution, class 0
            the background.
        detections: Any detector's detections; foregrounds are computed by GrabCut where they are None, and no detection
            head learns them.
        network: A trained one, `InstanceNetwork.load(path)`; default: hand-set parameters, kept between calls.
        config: Settings of the hand-set network, whose `semantic` must stay "logits" and which has no detection head.

    Raises:
        ValueError: If shapes, classes or boxes do not fit each other or the network, probabilities are negative or not
            finite, or the network has a semantic network of its own.
    """
    probabilities = _checked(semantic_probabilities)
    require(isinstance(detections, Detections), "detections", "instseg.Detections", type(detections).__name__)
    network = _network(network, config, len(probabilities))
    logits = np.log(np.maximum(probabilities, 1e-12)).astype(np.float32)
    return network.segment(image, detections, logits)


def _checked(semantic_probabilities: np.ndarray) -> np.ndarray:
    expected = "shape (L, h, w) with L >= 2"
    probabilities = array("semantic_probabilities", semantic_probabilities, expected)
    shape_ok = probabilities.ndim == 3 and len(probabilities) >= 2 and probabilities.size > 0
    require(shape_ok, "semantic_probabilities", expected, probabilities.shape)
    values_ok = bool(np.isfinite(probabilities).all() and probabilities.min() >= 0)
    require(values_ok, "semantic_probabilities", "finite values >= 0", "a negative, NaN or infinite one")
    return probabilities


def _network(network: InstanceNetwork | None, config: ModelConfig | None, num_labels: int) -> InstanceNetwork:
    if network is not None:
        require(isinstance(network, InstanceNetwork), "network", "an InstanceNetwork", type(network).__name__)
        require(config is None, "config", "None beside a network, which has its own", config)
    settings = network.config if network else config or ModelConfig()
    instead = f"{settings.semantic!r}; call InstanceNetwork.segment to run its own semantic network"
    require(settings.semantic == LOGITS, "semantic", f"{LOGITS!r} beside semantic_probabilities", instead)
    trained = "False without a trained network"
    require(network is not None or not settings.detection_head, "detection_head", trained, settings.detection_head)
    network = network or _hand_set(num_labels, settings)
    labels = f"{network.num_labels} labels as the network"
    require(num_labels == network.num_labels, "semantic_probabilities", labels, num_labels)
    return network


@lru_cache(maxsize=4)
def _hand_set(num_labels: int, config: ModelConfig) -> InstanceNetwork:
    return InstanceNetwork(config, num_labels).eval()
