from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from instseg.data.dataset import PreparedDataset, read_ahead
from instseg.data.files import read_json, write_json
from instseg.data.schema import FORMAT_VERSION
from instseg.data.source import Item
from instseg.data.voc import open_devkit
from instseg.storage import StoragePath
from tests.s3 import S3


def test_samples_equal_the_devkit(root: Path, devkit: Path) -> None:
    dataset, reader = PreparedDataset(str(root)), open_devkit(str(devkit))
    assert len(dataset) == 4
    assert dataset.classes[0] == "background"
    assert dataset.num_labels == 6
    for index in (3, 0, 2, 1):
        sample = dataset[index]
        assert sample.image_id == dataset.image_ids[index]
        item = Item(sample.image_id, "voc")
        truth = reader.read_truth(item, sample.image.shape[:2])
        assert truth is not None
        semantic, instances, labels = truth
        np.testing.assert_array_equal(sample.image, reader.read_image(item).pixels)
        np.testing.assert_array_equal(sample.semantic, semantic)
        np.testing.assert_array_equal(sample.instances, instances)
        np.testing.assert_array_equal(sample.instance_labels, labels)
    with pytest.raises(IndexError):
        dataset[4]


def test_is_cheap_to_send(root: Path) -> None:
    content = pickle.dumps(PreparedDataset(str(root)))  # what Ray does with it
    assert len(content) < 5000
    assert pickle.loads(content)[3].image_id == "scene_00003"  # noqa: S301


def test_a_subset_is_a_data_set_of_those_samples(root: Path) -> None:
    whole = PreparedDataset(str(root))
    part = pickle.loads(pickle.dumps(whole.subset([3, 0])))  # noqa: S301
    assert part.image_ids == ("scene_00003", "scene_00000")
    assert [sample.image_id for sample in (part[0], part[1])] == list(part.image_ids)
    np.testing.assert_array_equal(part[0].image, whole[3].image)
    assert (len(part), part.classes, part.subset([1]).image_ids) == (2, whole.classes, ("scene_00000",))
    assert len(whole) == len(whole.image_ids) == 4
    with pytest.raises(IndexError):
        part[2]


def test_a_directory_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in it; run workflows/prepare\.py first"):
        PreparedDataset(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": []}', "[" * 100_000, '{"versions": {"format": 2}}', "\xff"])
def test_a_damaged_manifest(root: Path, text: str) -> None:
    (root / "manifest.json").write_text(text, "latin1")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged; delete it"):
        PreparedDataset(str(root))


def test_a_manifest_that_was_changed(root: Path) -> None:
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"ball"', '"bell"'))
    with pytest.raises(ValueError, match="damaged; delete it"):
        PreparedDataset(str(root))


def test_a_manifest_of_another_format(root: Path) -> None:
    (root / "manifest.json").write_text('{"versions": {"format": 0}}')
    with pytest.raises(ValueError, match=f"expected data format {FORMAT_VERSION}, got 0"):
        PreparedDataset(str(root))


def test_a_shard_that_is_missing_or_too_short_is_named(root: Path) -> None:
    path = root / "shard-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"shard-00001\.parquet is damaged: expected .* run workflows/prepare\.py again"
    ):
        PreparedDataset(str(root))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.parquet is missing; run workflows/prepare\.py again"):
        PreparedDataset(str(root))


def test_a_flipped_bit_is_found_before_the_first_row_is_read(root: Path) -> None:
    path = root / "shard-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(flip(whole, len(whole) // 3))
    dataset = PreparedDataset(str(root))
    assert dataset[0].image_id == "scene_00000"  # the other shard is sound
    for read in (lambda: dataset[3], dataset.verify):
        with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged: expected SHA-256 .*prepare\.py again"):
            read()
    path.write_bytes(whole)
    assert dataset[3].image_id == "scene_00003"


def test_each_process_verifies_for_itself(root: Path) -> None:
    path = root / "shard-00001.parquet"
    dataset = PreparedDataset(str(root))
    dataset.verify()
    path.write_bytes(flip(path.read_bytes(), path.stat().st_size - 10))
    with pytest.raises(ValueError, match="expected SHA-256"):
        pickle.loads(pickle.dumps(dataset))[3]  # noqa: S301


def test_pages_are_checked_at_each_read(root: Path) -> None:
    """Bytes that change after the hash was compared, such as on a failing disk."""
    path = root / "shard-00001.parquet"
    dataset = PreparedDataset(str(root))
    dataset.verify()
    with pq.ParquetFile(path) as shard:
        image = shard.metadata.row_group(0).column(4)
    assert image.path_in_schema == "image"
    path.write_bytes(flip(path.read_bytes(), image.data_page_offset + image.total_compressed_size // 2))
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged: row 0 cannot be read"):
        dataset[3]


def test_a_shard_of_other_images_is_refused(root: Path) -> None:
    first, second = sorted(root.glob("*.parquet"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged: expected .* bytes"):
        PreparedDataset(str(root))
    manifest = read_json(root / "manifest.json")
    manifest["shards"][1] = manifest["shards"][0] | {"file": second.name, "image_ids": ["x", "y", "z"]}
    write_json(root / "manifest.json", manifest)
    with pytest.raises(
        ValueError, match=r"shard-00001\.parquet is damaged: expected image x in row 0, got scene_00000"
    ):
        PreparedDataset(str(root))[3]


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.fixture
def in_store(root: Path, s3: S3, request: pytest.FixtureRequest) -> StoragePath:
    """The same data directory in an object store."""
    store = StoragePath.of(s3("data")) / request.node.name
    for path in root.iterdir():
        (store / path.name).publish_file(path)
    return store


def test_an_object_store_gives_the_same_samples(root: Path, in_store: StoragePath, s3: S3) -> None:
    here, there = PreparedDataset(root), pickle.loads(pickle.dumps(PreparedDataset(in_store)))  # noqa: S301
    assert there.digest == here.digest
    for index in (0, 1, 3):
        np.testing.assert_array_equal(there[index].image, here[index].image)
        np.testing.assert_array_equal(there[index].logits, here[index].logits)
    there.verify()
    s3.requests.clear()
    assert there[2].image_id == here[2].image_id
    assert [request.split()[0] for request in s3.requests] == [
        "HEAD",
        "GET",
    ]  # the row is one range


def test_damage_in_an_object_store_is_found_at_the_row(in_store: StoragePath) -> None:
    shard = in_store / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.publish(bytes(content))
    dataset = PreparedDataset(in_store)
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is damaged: expected SHA-256"):
        dataset.verify()
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is damaged: row . cannot be read"):
        [dataset[index] for index in range(3)]
    shard.delete()
    with pytest.raises(FileNotFoundError, match=r"shard shard-00000\.parquet is missing"):
        PreparedDataset(in_store)


def test_the_digest_is_of_the_content(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert PreparedDataset(copy).digest == PreparedDataset(root).digest
    manifest = read_json(root / "manifest.json")
    manifest["shards"][0]["sha256"] = "other"
    write_json(copy / "manifest.json", manifest)
    assert PreparedDataset(copy).digest != PreparedDataset(root).digest


@pytest.mark.parametrize("num_ahead", [1, 2, 9])
def test_reading_ahead_keeps_the_order(root: Path, num_ahead: int) -> None:
    dataset, order = PreparedDataset(root), [2, 0, 3, 0, 1]
    read = [sample.image_id for sample in read_ahead(dataset.__getitem__, order, num_ahead)]
    assert read == [dataset.image_ids[index] for index in order]
    assert list(read_ahead(dataset.__getitem__, [], num_ahead)) == []


def test_samples_are_read_while_one_is_worked_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of those ahead, and none beyond."""
    dataset, read, enough = PreparedDataset(root), list[int](), threading.Event()

    def getitem(self: PreparedDataset, index: int) -> int:
        read.append(index)
        if len(read) == 4:
            enough.set()
        return index

    monkeypatch.setattr(PreparedDataset, "__getitem__", getitem)
    samples = read_ahead(dataset.__getitem__, range(100), num_ahead=3)
    next(samples)
    assert enough.wait(60)
    assert sorted(read) == [0, 1, 2, 3]
    samples.close()


def test_an_error_comes_where_its_sample_would(root: Path) -> None:
    samples = read_ahead(PreparedDataset(root).__getitem__, [0, 99, 1])
    assert next(samples).image_id == "scene_00000"
    with pytest.raises(IndexError):
        next(samples)
