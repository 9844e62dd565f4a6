"""Complete, named training runs. A run is a function that returns its whole configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from instseg.config import ModelConfig, SemanticCrfConfig, TrainConfig


def voc_logits(data: str, out: str) -> TrainConfig:
    """Detection head and both CRFs on the frozen logits of another network, as of the reconstructed VOC 2012 set."""
    # With learned foregrounds and priors a weaker agreement term is better: the map lacks objects that they see.
    crf = SemanticCrfConfig(detection_weight_x=2.0, detection_weight_y=1.0)
    model = ModelConfig(detection_head=True, semantic_crf=crf)
    return TrainConfig(data=data, out=out, model=model, num_epochs=13, num_head_epochs=12)


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
