"""Flipped bytes and torn files: an unchanged result, a quarantined item, or one line that names the file."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from instseg.data.dataset import PreparedDataset
from instseg.data.network_outputs import import_detections, read_detections, read_logits
from instseg.data.quarantine import CorruptItemError, QuarantineRow
from instseg.data.source import Item, Truth
from instseg.data.voc import open_devkit
from instseg.structures import Sample
from tests.data.conftest import NAMES

IMAGE_ID, SIZE, NUM_LABELS = "scene_00001", (64, 96), 6
ITEM, CATEGORIES = Item(IMAGE_ID, "voc"), {label: label for label in range(1, NUM_LABELS)}


def damages(content: bytes, num: int, seed: int) -> Iterator[bytes]:
    """One to four flipped bytes; every eighth file is torn as well."""
    rng = np.random.default_rng(seed)
    for index in range(num):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = rng.integers(len(content), size=rng.integers(1, 5))
        damaged[places] ^= rng.integers(1, 256, len(places), np.uint8)
        yield damaged[: rng.integers(len(content)) if index % 8 == 7 else None].tobytes()


def outcomes(path: Path, num: int, seed: int, read: Callable[[], object]) -> Counter[str]:
    """How `read` ends for `num` damages of the file at `path`; fails on any end that is not allowed."""
    whole, counts = path.read_bytes(), Counter()
    for damaged in damages(whole, num, seed):
        path.write_bytes(damaged)
        counts[outcome(path, read)] += 1
    path.write_bytes(whole)
    return counts


def outcome(path: Path, read: Callable[[], object]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata
        try:
            read()
        except CorruptItemError as caught:
            row, line = caught.row, ""
        except (ValueError, OSError) as caught:
            row, line = None, str(caught)
        else:
            return "read"
    if row:
        assert (row.image_id, Path(row.file).name) == (IMAGE_ID, path.name)
        return "quarantined"
    assert path.name in line
    assert "\n" not in line
    return "refused"


@pytest.fixture
def inputs(devkit: Path, tmp_path: Path) -> Path:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _truth(inputs: Path) -> Truth:
    truth = open_devkit(inputs, NAMES).read_truth(ITEM, SIZE)
    assert truth is not None
    return truth


def test_images(inputs: Path) -> None:
    def read() -> None:
        image = open_devkit(inputs).read_image(ITEM).pixels
        assert image.dtype == np.uint8
        assert image.ndim == 3

    path = inputs / f"JPEGImages/{IMAGE_ID}.jpg"
    counts = outcomes(path, 1000, 0, read)
    assert counts["quarantined"] > 100
    assert not counts["refused"]


@pytest.mark.parametrize("folder", ["SegmentationClass", "SegmentationObject"])
def test_masks(inputs: Path, folder: str) -> None:
    """A PNG has checksums, so that what can be read is what was written."""
    expected = _truth(inputs)

    def read() -> None:
        for got, want in zip(_truth(inputs), expected, strict=True):
            np.testing.assert_array_equal(got, want)

    counts = outcomes(inputs / folder / f"{IMAGE_ID}.png", 1000, 1, read)
    assert counts["quarantined"] > 100
    assert not counts["refused"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_logits(inputs: Path, save: Callable[..., None]) -> None:
    path, expected = inputs / "logits" / f"{IMAGE_ID}.npz", read_logits(str(inputs / "logits"), IMAGE_ID, NUM_LABELS)
    save(path, logits=expected)
    counts = outcomes(
        path,
        1000,
        2,
        lambda: np.testing.assert_array_equal(read_logits(str(path.parent), IMAGE_ID, NUM_LABELS), expected),
    )
    assert counts["quarantined"] > 500
    assert not counts["refused"]


def test_detections(inputs: Path) -> None:
    path, rows = inputs / "detections.json", []

    def read() -> None:
        records, orphans = read_detections(str(path))
        assert all(isinstance(row, QuarantineRow) for row in orphans)
        for image_id in records:
            detections, bad = import_detections(image_id, records[image_id], SIZE, CATEGORIES, min_score=0)
            detections.check_image(*SIZE, NUM_LABELS)
            rows.extend(bad)

    counts = outcomes(path, 1000, 3, read)
    assert counts["refused"] > 100
    assert not counts["quarantined"]  # a bad entry is a row, and the image stays
    assert all(row.file.startswith("detections.json[") for row in rows)
    assert len(rows) > 10


def _values(sample: Sample) -> list[object]:
    detections = sample.detections
    arrays = [sample.image, sample.semantic, sample.instances, sample.instance_labels, sample.logits]
    arrays += [detections.labels, detections.scores, detections.boxes, detections.foregrounds]
    return [sample.image_id, *(None if array is None else (array.shape, array.tobytes()) for array in arrays)]


@pytest.mark.parametrize("file", ["shard-00001.parquet", "manifest.json"])
def test_no_damage_changes_a_sample_or_a_class(root: Path, file: str) -> None:
    def read() -> None:
        dataset = PreparedDataset(str(root))
        assert (dataset.classes, _values(dataset[3])) == expected

    whole = PreparedDataset(str(root))
    expected = whole.classes, _values(whole[3])
    counts = outcomes(root / file, 1000, 4, read)
    assert counts["refused"] > 900
    assert not counts["quarantined"]


def test_damage_after_the_hash_was_compared(root: Path) -> None:
    """Then the checksums of the pages are what there is."""
    dataset = PreparedDataset(str(root))
    expected = _values(dataset[3])

    def read() -> None:
        assert _values(dataset[3]) == expected

    counts = outcomes(root / "shard-00001.parquet", 1000, 5, read)
    assert counts["refused"] > 500
    assert not counts["quarantined"]
