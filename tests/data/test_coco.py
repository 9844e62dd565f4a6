from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from instseg.data.coco import list_coco
from instseg.data.coco_masks import decode_segmentation
from instseg.data.quarantine import CorruptItemError, LeftOut
from instseg.data.source import Truth
from instseg.data.voc import VOC_CLASSES
from instseg.structures import Detections, Sample
from tests.data.test_categories import IDS_OF_VOC, NAMES

HEIGHT, WIDTH = SIZE = (12, 20)
Change = Callable[[dict[str, Any]], object]


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


@pytest.fixture
def index() -> dict[str, Any]:
    """Two images; two cats that overlap in 2 x 4 pixels and a dog on the first, a cat on the second."""

    def annotation(id_: int, image_id: int, category_id: int, *corners: int) -> dict[str, Any]:
        fields = {"id": id_, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
        return fields | {"segmentation": rectangle(*corners)}

    return {
        "images": [{"id": id_, "file_name": f"a/{id_}.png", "height": HEIGHT, "width": WIDTH} for id_ in (7, 12)],
        "categories": [{"id": id_, "name": name} for id_, name in ((18, "dog"), (17, "cat"), (90, "bench"))],
        "annotations": [
            annotation(30, 7, 18, 14, 2, 19, 6),
            annotation(10, 7, 17, 1, 1, 6, 5),
            annotation(20, 7, 17, 4, 1, 9, 5),
            annotation(40, 12, 17, 0, 0, 20, 12),
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    """Writes a JSON, beside whose images of that size it lies."""
    (tmp_path / "images/a").mkdir(parents=True)
    for image_id in (7, 12):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"images/a/{image_id}.png")

    def written(content: object) -> Path:
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return tmp_path / "instances.json"

    return written


def truth_of(path: Path, image_id: str, **options: Any) -> Truth:
    listing = list_coco(path, path.parent / "images", **options)
    item = next(item for item in listing.items if item.image_id == image_id)
    return listing.source.read_truth(item, listing.source.read_image(item).pixels.shape[:2])  # type: ignore[return-value]


@pytest.mark.real_data
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("classes", [None, VOC_CLASSES, ("person", "chair", "car"), ("person",)], ids=[80, 20, 3, 1])
def test_real_maps_are_those_of_pycocotools(shared_data: Path, split: str, classes: tuple[str, ...] | None) -> None:
    """How many of the masks that `COCO.annToMask` draws one by one a pixel is in decides what it is."""
    path = shared_data / f"coco/annotations/instances_{split}2017.json"
    listing = list_coco(path, shared_data / f"coco/{split}2017", classes)
    coco = COCO(str(path))
    chosen = IDS_OF_VOC if classes == VOC_CLASSES else [coco.getCatIds(catNms=[name])[0] for name in classes or NAMES]
    assert len(listing.source.classes) == len(chosen) + 1
    assert listing.quarantined == []
    assert [item.image_id for item in listing.items] == sorted(str(id_) for id_ in coco.imgs)
    seen = Counter[str]()
    for item in listing.items:
        assert json.loads(json.dumps(item.record)) == item.record
        size = listing.source.read_image(item).pixels.shape[:2]
        truth = listing.source.read_truth(item, size)
        assert truth is not None
        entries = [a for a in coco.imgToAnns[int(item.image_id)] if a["category_id"] in chosen]
        entries.sort(key=lambda entry: entry["id"])
        things = [entry for entry in entries if not entry["iscrowd"]]
        masks = np.array([coco.annToMask(thing) for thing in things], np.bool_).reshape(-1, *size)
        crowd = sum((coco.annToMask(a) for a in entries if a["iscrowd"]), start=np.zeros(size, np.uint8)) > 0
        num = masks.sum(0)
        void = (num > 1) | ((num == 0) & crowd)
        seen.update(overlaps=int((num > 1).sum()), crowds=int(crowd.sum()), instances=len(things))
        np.testing.assert_array_equal(truth.instances == -1, void)
        np.testing.assert_array_equal(truth.semantic == 255, void)
        np.testing.assert_array_equal(truth.semantic[(num == 0) & ~crowd], 0)
        np.testing.assert_array_equal(truth.instances[(num == 0) & ~crowd], 0)
        assert truth.instance_labels.shape == (len(things),)
        for k, (thing, mask) in enumerate(zip(things, masks, strict=True)):
            own, label = mask & (num == 1), chosen.index(thing["category_id"]) + 1
            np.testing.assert_array_equal(truth.instances == k + 1, own)
            np.testing.assert_array_equal(truth.semantic[own], label)
            assert truth.instance_labels[k] == (label if own.any() else 0)
    assert min(seen.values()) > 0


def test_overlaps_and_crowds_are_void_and_ids_are_in_the_order_of_the_annotations(
    index: dict[str, Any], write: Callable[[object], Path]
) -> None:
    crowd = np.zeros(SIZE, np.bool_)
    crowd[3:8, 5:16] = True  # over both cats, the dog and the background between them
    runs = coco_runs(crowd)
    for segmentation in (compressed(crowd), {"size": list(SIZE), "counts": runs}):
        entry = {"id": 5, "image_id": 7, "category_id": 18, "iscrowd": 1, "segmentation": segmentation}
        changed = index | {"annotations": [entry, *index["annotations"]]}
        semantic, instances, labels = truth_of(write(changed), "7")
        expected = np.zeros(SIZE, np.int32)
        expected[crowd] = -1
        expected[1:5, 1:6], expected[1:5, 4:9], expected[2:6, 14:19] = 1, 2, 3
        expected[1:5, 4:6] = -1
        np.testing.assert_array_equal(instances, expected)
        assert labels.tolist() == [1, 1, 2]  # classes by category id: cat, dog
        np.testing.assert_array_equal(semantic, np.array([0, 1, 1, 2, 255], np.uint8)[expected])
        sample = Sample("7", np.zeros((*SIZE, 3), np.uint8), Detections.empty(*SIZE), semantic, instances, labels)
        np.testing.assert_array_equal(sample.known_instances, instances)
        assert (semantic.dtype, instances.dtype, labels.dtype) == (np.uint8, np.int32, np.int64)


def coco_runs(mask: np.ndarray) -> list[int]:
    """Run lengths column by column, from 0s, counted one pixel at a time."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_an_instance_without_pixels_keeps_its_id(index: dict[str, Any], write: Callable[[object], Path]) -> None:
    index["annotations"][1]["segmentation"] = rectangle(4, 1, 9, 5)  # as the other cat's: nothing is left of either
    index["annotations"].append(index["annotations"][0] | {"id": 11, "segmentation": rectangle(0, 8, 0.01, 8.01)})
    _, instances, labels = truth_of(write(index), "7")
    assert labels.tolist() == [0, 0, 0, 2]
    assert np.unique(instances).tolist() == [-1, 0, 4]


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_read_as_pycocotools_reads_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 90, 2).tolist())
    mask = rng.random(size) < rng.choice([0.01, 0.5, 0.99])
    mask[0, 0] = True
    np.testing.assert_array_equal(decode_segmentation(compressed(mask), size), mask)
    np.testing.assert_array_equal(decode_segmentation({"size": list(size), "counts": coco_runs(mask)}, size), mask)


def test_polygons_overshoot_by_a_pixel_at_most() -> None:
    clipped = decode_segmentation(rectangle(-1, -1, WIDTH + 1, HEIGHT + 1), SIZE)
    np.testing.assert_array_equal(clipped[:, :-1], True)
    with pytest.raises(ValueError, match="polygon outside the image"):
        decode_segmentation(rectangle(-1.01, 0, 5, 5), SIZE)


ZIGZAG = [value for turn in range(200) for value in (turn / 10, HEIGHT * (turn % 2))]


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "segmentation is neither polygons nor RLE: NoneType"),
        ("x", "segmentation is neither polygons nor RLE: str"),
        ([], "empty segmentation"),
        ([[]], r"polygon without 3 points or more: .* got 0 numbers"),
        ([[1, 1, 5, 5]], r"polygon without 3 points or more: .* got 4 numbers"),  # pycocotools: a box
        ([[1, 1, 5, 5, 3, 3, 2]], r"polygon without 3 points or more: .* got 7 numbers"),
        ([*rectangle(1, 1, 5, 5), [1, 1]], r"polygon without 3 points or more: .* got 2 numbers"),
        ([5], "polygon without 3 points or more: .* got int"),
        ([[1, 1, 5, 5, 3, "3"]], r"polygon: expected finite numbers, got .* '3'"),
        ([[1, 1, 5, 5, 3, None]], r"polygon: expected finite numbers, got .* None"),
        ([[1, 1, 5, 5, 3, math.nan]], r"polygon: expected finite numbers, got .* nan"),
        ([[1, 1, 5, 5, 3, math.inf]], r"polygon: expected finite numbers, got .* inf"),
        (
            rectangle(30, 1, 40, 5),
            r"polygon outside the image: expected x 0\.\.20, y 0\.\.12, got x 30\.\.40, y 1\.\.5",
        ),
        (rectangle(1, 1, 1e9, 5), "polygon outside the image"),
        ([ZIGZAG], "polygon too long"),
        ({}, r"RLE of the wrong size: expected \[12, 20\], got None"),
        ({"size": [20, 12], "counts": [0, 240]}, r"RLE of the wrong size: expected \[12, 20\], got \[20, 12\]"),
        ({"size": [12, 20], "counts": [0, 241]}, "RLE of the wrong size: expected 240 pixels, got runs of 241"),
        ({"size": [12, 20], "counts": [0, 10**15]}, "RLE of the wrong size: expected 240 pixels"),
        ({"size": [12, 20], "counts": [250, -10]}, "RLE counts: expected integers of 0 or more"),
        ({"size": [12, 20], "counts": [240.0]}, "RLE counts: expected integers"),
        ({"size": [12, 20]}, "RLE counts: expected integers"),
        ({"size": [12, 20], "counts": [240]}, "empty segmentation"),
        ({"size": [12, 20], "counts": ""}, "RLE of the wrong size: expected 240 pixels, got runs of 0"),
        ({"size": [12, 20], "counts": "~~"}, "RLE counts: cannot be decoded at '~'"),
        ({"size": [12, 20], "counts": "é"}, "RLE counts: cannot be decoded at"),
        ({"size": [12, 20], "counts": "P"}, "RLE counts: cannot be decoded, end in the middle"),
        ({"size": [12, 20], "counts": "o" * 10**6}, "RLE counts: cannot be decoded at 'o'"),
        ({"size": [12, 20], "counts": "@"}, "RLE counts: expected integers of 0 or more"),  # -16
    ],
)
def test_a_bad_segmentation_makes_its_image_bad(
    index: dict[str, Any], write: Callable[[object], Path], segmentation: object, reason: str
) -> None:
    index["annotations"][1]["segmentation"] = segmentation
    path = write(index)
    with pytest.raises(CorruptItemError, match=reason) as caught:
        truth_of(path, "7")
    assert (caught.value.row.image_id, caught.value.row.file) == ("7", "instances.json[annotation 10]")
    assert truth_of(path, "12").instance_labels.tolist() == [1]


def at(position: int, part: str, **changes: Any) -> Change:
    return lambda index: index[part][position].update(changes)


def append(part: str, *entries: Any) -> Change:
    return lambda index: index[part].extend(entries)


def repeat(part: str, position: int, **changes: Any) -> Change:
    return lambda index: index[part].append(index[part][position] | changes)


def without(position: int, part: str, name: str) -> Change:
    return lambda index: index[part][position].pop(name)


@pytest.mark.parametrize(
    ("change", "row", "left"),
    [
        (append("images", 5), ("", "images 2", "id is not a plain file name"), ["12", "7"]),
        (append("images", {}, {}), ("", "images 2", "id is not a plain file name"), ["12", "7"]),
        (at(0, "images", id="../7"), ("../7", "images 0", "id is not a plain file name"), ["12"]),
        (at(0, "images", id=7.5), ("", "images 0", "id is not a plain file name"), ["12"]),
        (at(0, "images", id=True), ("", "images 0", "id is not a plain file name"), ["12"]),
        (repeat("images", 0, file_name="b.png"), ("7", "images 2", "image id is there before"), ["12", "7"]),
        (repeat("images", 0, id="7"), ("7", "images 2", "image id is there before"), ["12", "7"]),
        *(
            (at(0, "images", file_name=name), ("7", "images 0", "file_name is not a path inside"), ["12"])
            for name in ("../7.png", "a/../../7.png", "/7.png", "//7.png", "..\\7.png", "", None, 7)
        ),
        (at(0, "images", height=0), ("7", "images 0", "height and width: expected integers"), ["12"]),
        (at(0, "images", width="20"), ("7", "images 0", "height and width: expected integers above 0"), ["12"]),
        (append("annotations", None), ("", "annotations 4", "annotation of an unknown image"), ["12", "7"]),
        (repeat("annotations", 0, id=99, image_id=8), ("8", "annotations 4", "annotation of an unknown"), ["12", "7"]),
        (repeat("annotations", 0, image_id=12), ("12", "annotations 4", "annotation id is there before: 30"), ["7"]),
        (at(0, "annotations", id="30"), ("7", "annotations 0", "annotation id: expected an integer, got '30'"), ["12"]),
        (without(0, "annotations", "id"), ("7", "annotations 0", "annotation id: expected an integer"), ["12"]),
        (at(0, "annotations", category_id=3), ("7", "annotations 0", "annotation of an unknown category: 3"), ["12"]),
        (at(0, "annotations", category_id=[]), ("7", "annotations 0", "annotation of an unknown category"), ["12"]),
        (at(0, "annotations", iscrowd=2), ("7", "annotations 0", "iscrowd: expected 0 or 1, got 2"), ["12"]),
    ],
)  # fmt: skip
def test_a_bad_entry_concerns_its_image_alone(
    index: dict[str, Any],
    write: Callable[[object], Path],
    change: Change,
    row: tuple[str, str, str],
    left: list[str],
) -> None:
    change(index)
    path = write(index)
    listing = list_coco(path, path.parent / "images")
    first, (image_id, place, reason) = listing.quarantined[0], row
    assert (first.image_id, first.file) == (image_id, f"instances.json[{place}]")
    assert first.reason.startswith(reason)
    assert [item.image_id for item in listing.items] == left
    assert all(truth_of(path, kept) for kept in left)
    assert set(left) <= listing.known_ids <= {"7", "12", image_id} - {""}


def test_annotations_of_a_bad_image_are_not_reported_again(
    index: dict[str, Any], write: Callable[[object], Path]
) -> None:
    index["images"][0]["height"] = None
    path = write(index)
    listing = list_coco(path, path.parent / "images")
    assert len(listing.quarantined) == 1
    assert listing.known_ids == {"7", "12"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "expected an object with a list 'images'"),
        ({"images": [], "annotations": []}, "expected an object with a list 'categories'"),
        ({"images": [], "annotations": {}, "categories": []}, "expected an object with a list 'annotations'"),
        ({"images": [], "annotations": [], "categories": []}, "expected 1..254 classes, got 0"),
        ({"images": [], "annotations": [], "categories": [{"id": 1}]}, "categories: expected an id"),
        ({"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}, "categories: expected an id"),
        ({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}] * 2}, "categories: expected an id"),
        (
            {"images": [], "annotations": [], "categories": [{"id": k, "name": str(k)} for k in range(255)]},
            r"expected 1\.\.254 classes, got 255",
        ),
    ],
)
def test_a_json_that_is_malformed_as_a_whole_is_an_error(
    write: Callable[[object], Path], content: object, reason: str
) -> None:
    path = write(content)
    with pytest.raises(ValueError, match=reason) as caught:
        list_coco(path, path.parent / "images")
    assert str(path) in str(caught.value)


def test_names_what_is_missing(write: Callable[[object], Path], index: dict[str, Any], tmp_path: Path) -> None:
    path = write(index)
    with pytest.raises(FileNotFoundError, match=r"annotations .*none\.json: no such file"):
        list_coco(tmp_path / "none.json", tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"images .*none: no such folder"):
        list_coco(path, tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no category \['horse'\]; it has \['bench', 'cat', 'dog'\]"):
        list_coco(path, tmp_path / "images", ("cat", "horse"))
    for text in ("{", "[" * 100_000, "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"not a JSON file|nested too deeply"):
            list_coco(path, tmp_path / "images")


def test_classes_are_labels_in_the_order_asked_for(index: dict[str, Any], write: Callable[[object], Path]) -> None:
    path = write(index)
    everything = list_coco(path, path.parent / "images").source
    assert everything.classes == ("background", "cat", "dog", "bench")
    assert everything.categories == {17: 1, 18: 2, 90: 3}
    dogs = list_coco(path, path.parent / "images", ("bench", "dog"))
    assert dogs.source.categories == {17: 0, 18: 2, 90: 1}
    assert [len(item.record["annotations"]) for item in dogs.items] == [0, 1]
    assert truth_of(path, "7", classes=("dog",)).instance_labels.tolist() == [1]


def test_categories_of_one_name_are_one_class_and_background_is_none(
    index: dict[str, Any], write: Callable[[object], Path]
) -> None:
    index["categories"] = [{"id": k, "name": name} for k, name in ((0, "background"), (17, "pet"), (18, "pet"))]
    path = write(index)
    assert list_coco(path, path.parent / "images").source.categories == {0: 0, 17: 1, 18: 1}
    assert truth_of(path, "7").instance_labels.tolist() == [1, 1, 1]


def test_an_image_with_fewer_pixels_of_the_classes_is_left_out(
    index: dict[str, Any], write: Callable[[object], Path]
) -> None:
    path = write(index)
    num = 2 * 12 + 20  # both cats without their overlap, the dog
    assert (truth_of(path, "7", min_pixels=num).instances > 0).sum() == num
    with pytest.raises(LeftOut, match=r"^fewer than 45 pixels of the classes$"):
        truth_of(path, "7", min_pixels=num + 1)
    with pytest.raises(LeftOut):
        truth_of(path, "12", classes=("dog",), min_pixels=1)


def test_an_image_of_another_size_than_the_json_says_is_bad(
    index: dict[str, Any], write: Callable[[object], Path]
) -> None:
    index["images"][0]["width"] = WIDTH + 1
    path = write(index)
    listing = list_coco(path, path.parent / "images")
    with pytest.raises(
        CorruptItemError, match=r"image of another size: expected .*\(12, 21\).* got \(12, 20\)"
    ) as caught:
        listing.source.read_image(listing.items[1])
    assert (caught.value.row.image_id, caught.value.row.file) == ("7", "a/7.png")
    with pytest.raises(CorruptItemError, match="image of another size"):
        listing.source.read_truth(listing.items[1], SIZE)


def test_a_missing_photograph_is_named(index: dict[str, Any], write: Callable[[object], Path]) -> None:
    path = write(index)
    listing = list_coco(path, path.parent / "images")
    assert [file.local for file in listing.source.files(listing.items[1])] == [path.parent / "images/a/7.png"]
    shutil.rmtree(path.parent / "images/a")
    with pytest.raises(CorruptItemError, match=r"7: a/7\.png: file is missing"):
        listing.source.read_image(listing.items[1])


def test_more_instances_than_ids_are_bad(
    index: dict[str, Any], write: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instseg.data.coco.MAX_INSTANCES", 3)
    path = write(index)
    assert truth_of(path, "7").instance_labels.size == 3
    monkeypatch.setattr("instseg.data.coco.MAX_INSTANCES", 2)
    with pytest.raises(CorruptItemError, match="more than 2 instances"):
        truth_of(path, "7")
