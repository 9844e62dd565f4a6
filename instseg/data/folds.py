"""A data directory in folds by image: which images a run trains on, and which it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import digest


def split_folds(image_ids: Sequence[str], num_folds: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Deal the images out, in an order that their ids and the seed alone decide.

    Args:
        image_ids: Each id once, in any order.
        num_folds: At least 2, and no more than there are images.
        seed: Another one gives other folds.

    Returns:
        For each fold the indices into `image_ids`, ascending. Every index is in one fold; their sizes differ by 1 at
        most.

    Raises:
        ValueError: If there cannot be so many folds.
    """
    if not 2 <= num_folds <= len(image_ids):
        raise ValueError(f"num_folds: expected 2 to {len(image_ids)}, the number of images, got {num_folds}")
    # Hashes, because NumPy's random streams may change from one version to the next.
    order = sorted(range(len(image_ids)), key=lambda index: digest([seed, image_ids[index]]))
    return tuple(tuple(sorted(order[fold::num_folds])) for fold in range(num_folds))


def training_images(config: TrainConfig) -> PreparedDataset:
    """What a run trains on: the images of `config.data`, without the fold `config.held_out` if there is one.

    Raises:
        FileNotFoundError: If the data directory is missing or not prepared.
        ValueError: If it is damaged, or has fewer images than folds.
    """
    dataset = PreparedDataset(config.data)
    if config.held_out is None:
        return dataset
    held_out = split_folds(dataset.image_ids, config.num_folds, config.fold_seed)[config.held_out]
    return dataset.subset(sorted(set(range(len(dataset))) - set(held_out)))
