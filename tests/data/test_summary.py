"""The counts of a data directory, against those of its decoded samples."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from instseg.data.dataset import PreparedDataset
from instseg.data.files import sha256_of, write_json
from instseg.data.quarantine import QUARANTINE, QuarantineRow, write_quarantine
from instseg.data.schema import FORMAT_VERSION, SCHEMA, encode_row
from instseg.data.summary import DataSummary, Spread
from instseg.structures import Detections, Sample

CLASSES = ("background", *(f"class {label}" for label in range(1, 81)))


def random_sample(index: int) -> Sample:
    """Up to three instances, of which one may have no pixel, and up to four detections; every third has no truth."""
    rng = np.random.default_rng(index)
    height, width = rng.integers(8, 24, 2)
    num = int(rng.integers(0, 5))
    corners = rng.integers(0, 4, (num, 2))
    foregrounds = rng.random((num, height, width)) < 0.4
    labels, scores = rng.integers(1, len(CLASSES), num), rng.uniform(0.1, 1, num)
    detections = Detections(labels, scores, np.hstack([corners, corners + 4]), foregrounds)
    image = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
    logits = rng.normal(size=(len(CLASSES), 1, 1)).astype(np.float16) if index % 2 else None
    if index % 3 == 0:
        return Sample(f"image {index}", image, detections, logits=logits)
    instances = rng.integers(-1, 4, (height, width)).astype(np.int32)
    instances[instances == index % 4] = 0
    labels = np.where(np.isin([1, 2, 3], instances), rng.integers(1, len(CLASSES), 3), 0)
    semantic = np.array([0, *labels, 255], np.uint8)[instances]
    return Sample(f"image {index}", image, detections, semantic, instances, labels, logits)


def write_rows(root: Path, shards: list[list[dict[str, Any]]], **more: Any) -> PreparedDataset:
    """A data directory of these rows."""
    entries = []
    for index, rows in enumerate(shards):
        path = root / f"shard-{index}.parquet"
        table = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, path, row_group_size=1, write_page_checksum=True, use_dictionary=False)
        ids = [row["image_id"] for row in rows]
        size = path.stat().st_size
        entries.append({"file": path.name, "num_bytes": size, "sha256": sha256_of(path), "image_ids": ids})
    versions = {"format": FORMAT_VERSION, "numpy": "2"}
    write_json(root / "manifest.json", {"classes": CLASSES, "shards": entries, "versions": versions, **more})
    return PreparedDataset(root)


def encode(sample: Sample, source: str, path: Path) -> dict[str, Any]:
    Image.fromarray(sample.image).save(path / "image.png")
    foreground_sources = ["box" if score > 0.7 else "grabcut" for score in sample.detections.scores]
    return encode_row(sample, (path / "image.png").read_bytes(), foreground_sources, source)


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    """Forty images of two sources in three shards, of which one is empty."""
    samples = [random_sample(index) for index in range(40)]
    rows = [encode(sample, "coco" if len(sample.detections) > 2 else "voc", tmp_path) for sample in samples]
    return write_rows(tmp_path, [rows[:25], [], rows[25:]])


def test_all_counts_are_those_of_the_decoded_samples(dataset: PreparedDataset) -> None:
    samples = [dataset[index] for index in range(len(dataset))]
    found = DataSummary.of(dataset)
    truths = [
        CLASSES[sample.instance_labels[instance - 1]]
        for sample in samples
        if sample.instances is not None
        for instance in np.unique(sample.instances[sample.instances > 0])
    ]
    detected = [CLASSES[label] for sample in samples for label in sample.detections.labels]
    per_image = [len(sample.detections) for sample in samples]
    scores = np.concatenate([sample.detections.scores for sample in samples])
    assert found.num_images == 40
    assert found.sources == Counter("coco" if num > 2 else "voc" for num in per_image)
    assert found.num_with_logits == 20
    assert found.num_with_instances == sum(
        (sample.instances > 0).any() for sample in samples if sample.instances is not None
    )
    assert tuple(found.instances) == tuple(found.detections) == CLASSES[1:]
    assert +Counter(found.instances) == Counter(truths)
    assert +Counter(found.detections) == Counter(detected)
    assert found.foregrounds == {"box": (scores > 0.7).sum(), "grabcut": (scores <= 0.7).sum()}
    for spread, values in (
        (found.height, [sample.image.shape[0] for sample in samples]),
        (found.width, [sample.image.shape[1] for sample in samples]),
        (found.detections_per_image, per_image),
    ):
        assert spread == (min(values), statistics.median(values), max(values))
    assert found.num_shards == 3
    assert found.num_bytes == sum(path.stat().st_size for path in Path(dataset.root.key).glob("*.parquet"))
    assert (found.quarantined, found.digest) == ({}, dataset.digest)
    assert found == DataSummary.of(dataset.subset([3]))


def test_foreground_sources_are_in_the_order_of_the_detections(dataset: PreparedDataset) -> None:
    for index in reversed(range(len(dataset))):
        scores = dataset[index].detections.scores
        assert dataset.foreground_sources(index) == ["box" if score > 0.7 else "grabcut" for score in scores]


def test_tables_have_a_number_for_every_class_the_most_frequent_first(dataset: PreparedDataset) -> None:
    found = DataSummary.of(dataset)
    (table,) = [table for table in found.tables() if table[0][0] == "class"]
    _, *classes, (_, *totals) = table
    pairs = [(int(instances), int(detections)) for _, instances, detections in classes]
    assert pairs == sorted(pairs, reverse=True)
    assert {name: int(number) for name, number, _ in classes} == found.instances
    assert totals == [str(sum(column)) for column in zip(*pairs, strict=True)]
    assert (0, 0) in pairs
    for table in found.tables():
        assert len({len(row) for row in table}) == 1


def test_no_image_is_read(dataset: PreparedDataset) -> None:
    """Where the bytes of every image and mask are damaged, the counts are what they were."""
    before = DataSummary.of(dataset)
    for path in (Path(dataset.root.key) / f"shard-{index}.parquet" for index in (0, 2)):
        content = path.read_bytes()
        assert content.count(b"\x89PNG") >= 15
        path.write_bytes(content.replace(b"\x89PNG", b"----").replace(b"IHDR", b"----"))
    assert DataSummary.of(dataset) == before
    with pytest.raises(ValueError, match="is damaged"):
        dataset[0]


def test_damage_of_what_is_counted_is_named(dataset: PreparedDataset) -> None:
    path = Path(dataset.root.key) / "shard-2.parquet"
    path.write_bytes(path.read_bytes().replace(b"grabcut", b"grabcat"))
    with pytest.raises(ValueError, match=r"shard shard-2\.parquet is damaged: a column cannot be read"):
        DataSummary.of(dataset)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-2\.parquet"):
        DataSummary.of(dataset)


def test_what_was_quarantined_is_counted_by_kind(tmp_path: Path) -> None:
    rows = [encode(random_sample(1), "voc", tmp_path)]
    dataset = write_rows(tmp_path, [rows], num_quarantined=3, notes={"rotated": 2})
    with pytest.raises(FileNotFoundError, match=QUARANTINE):
        DataSummary.of(dataset)
    reasons = ["box: expected 4 numbers, got 3", "file is missing", "box: expected 4 numbers, got 5"]
    write_quarantine(tmp_path / QUARANTINE, [QuarantineRow(f"{n}", "f", reason) for n, reason in enumerate(reasons)])
    found = DataSummary.of(dataset)
    assert found.quarantined == {"box": 2, "file is missing": 1}
    assert ["rotated", "2"] in found.tables()[0]


def test_a_directory_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images"):
        DataSummary.of(write_rows(tmp_path, [[]]))


@pytest.mark.parametrize("values", [[3], [1, 2], [5, 5, 5, 1, 9, 9], [0, 0, 7]])
def test_a_spread_is_of_every_number_as_often_as_it_is_there(values: list[int]) -> None:
    assert Spread.of(Counter(values)) == (min(values), statistics.median(values), max(values))
