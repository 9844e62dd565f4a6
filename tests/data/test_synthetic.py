from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instseg.data.network_outputs import import_detections, read_detections, read_logits
from instseg.data.scenes import draw_scene
from instseg.data.synthetic import write_synthetic_devkit
from instseg.data.voc import open_devkit
from instseg.jobs.sources import read_classes


def _content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_reads_like_any_other_data_set(devkit: Path) -> None:
    classes = read_classes(str(devkit / "classes.txt"))
    reader = open_devkit(str(devkit), ("background", *classes))
    num_labels = len(classes) + 1
    records, orphans = read_detections(str(devkit / "detections.json"))
    assert not orphans
    items = reader.list_split("train").items + reader.list_split("val").items
    assert len(items) == 6
    for item in items:
        image_id, truth = item.image_id, reader.read_truth(item, (64, 96))
        assert truth is not None
        semantic, instances, labels = truth
        assert reader.read_image(item).pixels.shape == (64, 96, 3)
        assert len(labels) >= 3
        assert (labels > 0).all()
        assert ((semantic == 255) == (instances == -1)).all()
        _, bad = import_detections(image_id, records.get(image_id, []), (64, 96), reader.categories, 0.05)
        assert bad == []
        assert read_logits(str(devkit / "logits"), image_id, num_labels).shape == (num_labels, 8, 12)


def test_same_seed_same_bytes(devkit: Path, tmp_path: Path) -> None:
    write_synthetic_devkit(str(tmp_path / "again"), num_train=4, num_val=2, seed=3, size=(64, 96))
    assert _content(tmp_path / "again") == _content(devkit)
    write_synthetic_devkit(str(tmp_path / "other"), num_train=1, num_val=0, seed=4, size=(64, 96))
    image = "JPEGImages/scene_00000.jpg"
    assert (tmp_path / "other" / image).read_bytes() != (devkit / image).read_bytes()


def test_networks_are_informative_and_wrong_in_places(devkit: Path) -> None:
    reader = open_devkit(str(devkit))
    agree, total = 0, 0
    for item in reader.list_split("train").items:
        truth = reader.read_truth(item, (64, 96))
        assert truth is not None
        semantic = truth.semantic
        logits = read_logits(str(devkit / "logits"), item.image_id, 6).astype(np.float32)
        coarse = logits.argmax(0).repeat(8, 0).repeat(8, 1)
        known = semantic != 255
        agree, total = agree + (coarse == semantic)[known].sum(), total + known.sum()
    assert 0.6 < agree / total < 0.97


def test_objects_of_one_class_hide_each_other() -> None:
    touching = 0
    for seed in range(10):
        scene = draw_scene(np.random.default_rng(seed), 64, 96)
        assert scene.labels.shape == (scene.instances.max(),)
        assert set(np.unique(scene.instances)) == set(range(len(scene.labels) + 1))
        left, right = scene.instances[:, :-1], scene.instances[:, 1:]
        border = (left != right) & (left > 0) & (right > 0)
        touching += bool((scene.semantic[:, :-1] == scene.semantic[:, 1:])[border].any())
    assert touching >= 3


@pytest.mark.parametrize("size", [(60, 96), (16, 96)])
def test_refuses_a_size_that_the_logits_do_not_divide(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        write_synthetic_devkit(str(tmp_path), 1, 0, 0, size)
