from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from instseg.data.dataset import PreparedDataset
from instseg.data.network_outputs import read_detections
from instseg.data.schema import FORMAT_VERSION
from instseg.data.shards import ShardPlan, make_shard
from instseg.data.voc import open_devkit
from instseg.jobs.prepare import read_classes


@pytest.fixture
def root(devkit: Path, tmp_path: Path) -> Path:
    """A data directory of two shards, made without Ray."""
    reader = open_devkit(str(devkit))
    ids = reader.image_ids("train")
    plan = ShardPlan(
        out=tmp_path,
        devkit=reader,
        logits=str(devkit / "logits"),
        classes=("background", *read_classes(str(devkit / "classes.txt"))),
        has_ground_truth=True,
        min_score=0.05,
        grabcut_iterations=1,
        shards=(tuple(ids[:3]), tuple(ids[3:])),
        detections=read_detections(str(devkit / "detections.json"))[0],
        digest="x",
    )
    reports = [make_shard(plan, index) for index in range(2)]
    shards = [{"file": r.file, "num_rows": r.num_rows, "image_ids": r.image_ids} for r in reports]
    manifest = {"classes": plan.classes, "shards": shards, "versions": {"format": FORMAT_VERSION}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_samples_equal_the_devkit(root: Path, devkit: Path) -> None:
    dataset, reader = PreparedDataset(str(root)), open_devkit(str(devkit))
    assert len(dataset) == 4
    assert dataset.classes[0] == "background"
    assert dataset.num_labels == 6
    for index in (3, 0, 2, 1):
        sample = dataset[index]
        assert sample.image_id == dataset.image_ids[index]
        _, image = reader.read_image(sample.image_id)
        semantic, instances, labels = reader.read_masks(sample.image_id, image.shape[:2], 6)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.semantic, semantic)
        np.testing.assert_array_equal(sample.instances, instances)
        np.testing.assert_array_equal(sample.instance_labels, labels)
    with pytest.raises(IndexError):
        dataset[4]


def test_is_cheap_to_send(root: Path) -> None:
    content = pickle.dumps(PreparedDataset(str(root)))  # what Ray does with it
    assert len(content) < 5000
    assert pickle.loads(content)[3].image_id == "scene_00003"  # noqa: S301


def test_a_directory_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in it; run workflows/prepare\.py first"):
        PreparedDataset(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": []}'])
def test_a_damaged_manifest(root: Path, text: str) -> None:
    (root / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="damaged; delete it"):
        PreparedDataset(str(root))


def test_a_manifest_of_another_format(root: Path) -> None:
    (root / "manifest.json").write_text('{"versions": {"format": 0}}')
    with pytest.raises(ValueError, match=f"expected data format {FORMAT_VERSION}, got 0"):
        PreparedDataset(str(root))


def test_a_damaged_shard_is_named(root: Path) -> None:
    path = root / "shard-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged .* run workflows/prepare\.py again"):
        PreparedDataset(str(root))
    path.write_bytes((root / "shard-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"shard-00001\.parquet: expected 1 rows, got 3"):
        PreparedDataset(str(root))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.parquet is missing"):
        PreparedDataset(str(root))
