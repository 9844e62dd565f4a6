"""Complete, named training runs. A run is a function that returns its whole configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from instseg.config import ModelConfig, SemanticCrfConfig, TrainConfig


def voc_logits(data: str, out: str) -> TrainConfig:
    """The detection head, on the frozen logits of another network, as of the reconstructed VOC 2012 set.

    --num-epochs 13 trains both CRFs too. Cross-validated that gains nothing over their hand-set weights, and rates
    above these lose what the pairwise term gives to the mean IoU: each class is in few images.
    """
    # With learned foregrounds and priors a weaker agreement term is better: the map lacks objects that they see.
    crf = SemanticCrfConfig(detection_weight_x=2.0, detection_weight_y=1.0)
    return TrainConfig(
        data=data,
        out=out,
        model=ModelConfig(detection_head=True, semantic_crf=crf),
        num_epochs=12,
        num_head_epochs=12,
        learning_rate_crf=0.01,
        learning_rate_compatibility=0.001,
        semantic_loss_weight=1.0,
    )


def voc_fcn8s(data: str, out: str) -> TrainConfig:
    """FCN-8s and both CRFs end to end; give --model.semantic-weights to start from ImageNet."""
    return TrainConfig(data=data, out=out, model=ModelConfig(semantic="fcn8s"), num_epochs=30)


def synthetic(data: str, out: str) -> TrainConfig:
    """Both CRFs on the generated scenes of the demo."""
    return TrainConfig(data=data, out=out, num_epochs=2)


RECIPES: tuple[Callable[[str, str], TrainConfig], ...] = (voc_logits, voc_fcn8s, synthetic)


def find_recipe(name: str) -> Callable[[str, str], TrainConfig]:
    """The recipe of that name.

    Raises:
        ValueError: If there is none, suggesting the nearest.
    """
    by_name = {recipe.__name__: recipe for recipe in RECIPES}
    if name not in by_name:
        nearest = difflib.get_close_matches(name, by_name, n=1, cutoff=0)[0]
        raise ValueError(f"recipe: no {name!r} among {', '.join(by_name)}; did you mean {nearest!r}?")
    return by_name[name]
