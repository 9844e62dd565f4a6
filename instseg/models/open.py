"""The semantic network that images are prepared with: a name, or one trained here."""

from __future__ import annotations

from collections.abc import Sequence

from instseg.checks import require
from instseg.models.checkpoint import check_classes, find_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.models.semantic import FCN8S, LOGITS, SemanticNetwork, build_semantic
from instseg.storage import StoragePath


def open_semantic(source: str, classes: Sequence[str], weights: str | None = None) -> SemanticNetwork:
    """A semantic network in evaluation mode, on the CPU.

    Args:
        source: A name as of `build_semantic`; or a checkpoint or run directory, a folder or a URI.
        classes: The data's, 0 the background.
        weights: As of `build_semantic`; a checkpoint has its own.

    Raises:
        ValueError: If the name is unknown, or the network does not fit the classes or is none: logits, or a checkpoint
            that was trained on them; or one that is named has not been trained.
        FileNotFoundError: If there is no such checkpoint, or the weights cannot be had.
    """
    if "/" in source or StoragePath.of(source).is_folder():
        network = _trained(source, classes, weights)
    else:
        expected = "a checkpoint of a trained one, whose scores are not all 0"
        require(source != FCN8S, "semantic", expected, f"the name {FCN8S!r}")
        network = build_semantic(source, len(classes), weights)
    if network is None:
        raise ValueError(f"semantic {source}: expected a semantic network, got {LOGITS!r}, which need none")
    return network.eval()


def _trained(source: str, classes: Sequence[str], weights: str | None) -> SemanticNetwork | None:
    if weights is not None:
        raise ValueError(f"semantic_weights: expected none beside the checkpoint {source}, got {weights!r}")
    checkpoint = find_checkpoint(source)
    check_classes(checkpoint, classes)
    return InstanceNetwork.load(checkpoint.folder, num_labels=len(classes)).semantic
