from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instseg.config import TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import split_folds, training_images

IDS = tuple(f"image_{index}" for index in range(23))


@given(data=st.data(), num_images=st.integers(2, 40), seed=st.integers())
def test_every_image_is_in_one_fold(data: st.DataObject, num_images: int, seed: int) -> None:
    ids = [f"image_{index}" for index in range(num_images)]
    num_folds = data.draw(st.integers(2, num_images))
    folds = split_folds(ids, num_folds, seed)
    assert len(folds) == num_folds
    assert sorted(index for fold in folds for index in fold) == list(range(num_images))
    sizes = {len(fold) for fold in folds}
    assert max(sizes) - min(sizes) <= 1
    assert all(list(fold) == sorted(fold) for fold in folds)


def test_ids_and_seed_alone_decide() -> None:
    def by_id(ids: tuple[str, ...], seed: int) -> list[set[str]]:
        return [{ids[index] for index in fold} for fold in split_folds(ids, 4, seed)]

    assert by_id(IDS, 0) == by_id(IDS[::-1], 0)
    assert by_id(IDS, 0) != by_id(IDS, 1)
    # Golden: results of different versions are compared fold by fold.
    assert split_folds(IDS[:7], 3, 0) == ((0, 1, 2), (4, 5), (3, 6))


@pytest.mark.parametrize("num_folds", [-1, 0, 1, 24])
def test_a_number_of_folds_that_cannot_be(num_folds: int) -> None:
    with pytest.raises(ValueError, match=f"num_folds: expected 2 to 23, the number of images, got {num_folds}"):
        split_folds(IDS, num_folds, 0)


def test_a_run_trains_on_what_it_does_not_hold_out(root: Path) -> None:
    config = TrainConfig(str(root), "out")
    every = PreparedDataset(str(root)).image_ids
    assert training_images(config).image_ids == every
    held_out = split_folds(every, 3, 5)
    for fold in range(3):
        ids = training_images(TrainConfig(str(root), "out", held_out=fold, num_folds=3, fold_seed=5)).image_ids
        assert ids == tuple(image_id for index, image_id in enumerate(every) if index not in held_out[fold])
    with pytest.raises(ValueError, match="num_folds: expected 2 to 4"):
        training_images(TrainConfig(str(root), "out", held_out=0))
