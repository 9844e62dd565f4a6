"""Complete, named training runs. A run is a function that returns its whole configuration.

Each opens with what to give to `workflows/train.py`, how long it takes, and what comes of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from instseg.config import AugmentConfig, ModelConfig, SemanticCrfConfig, TrainConfig


def voc_logits(data: str, out: str) -> TrainConfig:
    """`--recipe voc_logits --data runs/voc/train --out runs/voc/run`: the README has its time and its results.

    The detection head, on the frozen logits of another network, as of the reconstructed VOC 2012 set.
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


# Published rates are of losses summed over the pixels of an image; ours are means, of 500 x 375 pixels in VOC.
_PIXELS = 500 * 375
_FCN_RATE = 1e-10 * _PIXELS  # 1.9e-5
_FINE_RATE = 1e-11 * _PIXELS  # 1.9e-6


def paper_stage1(data: str, out: str) -> TrainConfig:
    """`--recipe paper_stage1 --data runs/trainaug --out runs/stage1`: a day on a GPU is our guess; not run here.

    FCN-8s at once from ImageNet's VGG-16, by the published schedule: one image a step, SGD with momentum 0.99, decay
    5e-4, biases at twice the rate, 1e-10 for the sum over pixels and thus 1.9e-5 for their mean, kept constant. The
    number of epochs is ours. The paper's set is VOC, SBD and COCO: a run on COCO, and --start-from it one on trainaug.
    """
    return TrainConfig(
        data=data,
        out=out,
        model=ModelConfig(semantic="fcn8s", semantic_weights="default"),
        train_through="network",
        augment=AugmentConfig(flip=True),
        num_epochs=20,
        num_workers=1,
        optimizer="sgd",
        momentum=0.99,
        weight_decay=5e-4,
        learning_rate_network=_FCN_RATE,
        learning_rate_schedule="constant",
        semantic_loss_weight=1.0,
        probability_floor=0.0,
        checkpoint_every=1000,
    )


def paper_stage2(data: str, out: str) -> TrainConfig:
    """`--recipe paper_stage2 --data runs/voc/train --out runs/stage2 --start-from runs/stage1`: hours; not run here.

    The higher-order CRF behind the network, fine-tuned with it on VOC alone: 1e-11 for the sum over pixels and thus
    1.9e-6 for their mean, and of that 1e4 times for kernel weights and 1e3 times for the compatibility, the multipliers
    of CRF-as-RNN: 0.019 and 0.0019. The number of epochs is ours.
    """
    stage1 = paper_stage1(data, out)
    return replace(
        stage1,
        model=replace(stage1.model, semantic_weights=None),
        train_through="semantic_crf",
        num_epochs=10,
        learning_rate_network=_FINE_RATE,
        learning_rate_crf=1e4 * _FINE_RATE,
        learning_rate_compatibility=1e3 * _FINE_RATE,
    )


def end_to_end(data: str, out: str) -> TrainConfig:
    """`--recipe end_to_end --data runs/voc/train --out runs/end --start-from runs/stage2`: hours; not run here.

    The instance loss through both CRFs into the network, at the rates of the second stage. The paper gives no instance
    loss; this is the cross-entropy of Arnab & Torr, CVPR 2017.
    """
    return replace(paper_stage2(data, out), train_through="instance_crf", instance_loss="log")


def crf_only(data: str, out: str) -> TrainConfig:
    """`--recipe crf_only --data runs/voc/train --out runs/crf`: an hour on two cores is our guess; not run here.

    The weights of both CRFs, some 900 numbers, on the frozen logits of another network.
    """
    return TrainConfig(
        data=data,
        out=out,
        num_epochs=5,
        learning_rate_crf=0.01,
        learning_rate_compatibility=0.001,
        semantic_loss_weight=1.0,
    )


def small_stage1(data: str, out: str) -> TrainConfig:
    """`--recipe small_stage1 --data runs/voc/train --out runs/small1 --model.semantic-weights vgg16.safetensors`.

    Half an hour on two cores with AVX512-BF16. FCN-8s with 512 channels in fc6 and fc7, for a few hundred images and no
    GPU: images are seen at half to all of their size, and the first three of VGG-16's stages stay as they are.
    """
    return TrainConfig(
        data=data,
        out=out,
        model=ModelConfig(semantic="fcn8s", fcn_width=512, fcn_padding=1),
        train_through="network",
        augment=AugmentConfig(flip=True, scale=(0.5, 1.0), crop=384),
        num_epochs=10,
        num_workers=2,
        precision="bfloat16",
        weight_decay=1e-4,
        learning_rate_network=5e-5,
        learning_rate_new=5e-4,
        frozen_stages=3,
        semantic_loss_weight=1.0,
        probability_floor=0.0,
        checkpoint_every=50,
    )


def small_stage2(data: str, out: str) -> TrainConfig:
    """`--recipe small_stage2 --data runs/voc/train --out runs/small2 --start-from runs/small1`.

    A quarter of an hour there. The higher-order CRF behind the network of `small_stage1`, and both trained. The floor
    of the probabilities is the default one, since what no detection has found costs most.
    """
    return replace(
        small_stage1(data, out),
        train_through="semantic_crf",
        num_epochs=3,
        learning_rate_network=1e-5,
        learning_rate_new=5e-5,
        learning_rate_crf=0.01,
        learning_rate_compatibility=0.001,
        probability_floor=0.2,
    )


def small_end_to_end(data: str, out: str) -> TrainConfig:
    """`--recipe small_end_to_end --data runs/voc/train --out runs/small3 --start-from runs/small2`.

    A quarter of an hour there. The instance loss through both CRFs into the network of `small_stage2`, beside the
    semantic one.
    """
    return replace(small_stage2(data, out), train_through="instance_crf")


def demo(data: str, out: str) -> TrainConfig:
    """`--recipe demo --data runs/demo/train --out runs/demo/run`: a minute on two cores, as part of `make demo`.

    Both CRFs on the generated scenes.
    """
    return TrainConfig(data=data, out=out, num_epochs=2)


RECIPES: tuple[Callable[[str, str], TrainConfig], ...] = (
    voc_logits,
    paper_stage1,
    paper_stage2,
    end_to_end,
    crf_only,
    small_stage1,
    small_stage2,
    small_end_to_end,
    demo,
)


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
