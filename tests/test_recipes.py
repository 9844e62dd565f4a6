"""Every recipe is a run that can start, and says how to start it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from instseg.models.network import InstanceNetwork
from instseg.recipes import RECIPES, find_recipe, paper_stage1, paper_stage2
from instseg.training.optimizer import build_optimizer, freeze

CRFS = {"crf", "compatibility"}
PAPER = {"network", "network_bias", "new", "new_bias"}
TRAINED = {
    "voc_logits": CRFS | {"head"},
    "paper_stage1": PAPER,
    "paper_stage2": CRFS | PAPER,
    "end_to_end": CRFS | PAPER,
    "crf_only": CRFS,
    "small_stage1": PAPER,
    "small_stage2": CRFS | PAPER,
    "small_end_to_end": CRFS | PAPER,
    "demo": CRFS,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_it_opens_with_its_command_and_trains_its_parts(recipe) -> None:
    assert find_recipe(recipe.__name__) is recipe
    assert recipe.__doc__.startswith(f"`--recipe {recipe.__name__} --data ")
    config = recipe("data", "out")
    with torch.device("meta"):
        network = InstanceNetwork(replace(config.model, semantic_weights=None), num_labels=21)
    freeze(network, config)
    assert {group["name"] for group in build_optimizer(network, config).param_groups} == TRAINED[recipe.__name__]


def test_the_published_rates_are_those_of_a_mean_over_pixels() -> None:
    first, second = paper_stage1("data", "out"), paper_stage2("data", "out")
    assert first.learning_rate_network == pytest.approx(1.875e-5)
    assert second.learning_rate_network == pytest.approx(1.875e-6)
    assert second.learning_rate_crf == pytest.approx(0.01875)
    assert second.learning_rate_compatibility == pytest.approx(0.001875)
