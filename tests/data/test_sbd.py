from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from instseg.data.quarantine import CorruptItemError
from instseg.data.sbd import SbdFolder, list_sbd
from instseg.data.source import Item
from instseg.data.voc import VocDevkit, open_devkit
from instseg.storage import StoragePath
from tests.data.test_matlab import bomb

SIZE = (30, 40)
SEMANTIC = np.zeros(SIZE, np.uint8)
INSTANCES = np.zeros(SIZE, np.uint8)
SEMANTIC[2:9, 3:20], INSTANCES[2:9, 3:20] = 15, 1
SEMANTIC[9:20, 10:30], INSTANCES[9:20, 10:30] = 15, 3
SEMANTIC[25:, :], INSTANCES[25:, :] = 20, 4
CATEGORIES = np.array([[15], [7], [15], [20]], np.uint8)  # the second instance has no pixel


def boundaries(num: int) -> np.ndarray:
    """A cell array of sparse matrices, as in the published files."""
    cells = np.empty((num, 1), object)
    for row in range(num):
        cells[row, 0] = csc_matrix(SIZE, dtype=np.float64)
    return cells


def gt_cls(**changes: Any) -> dict[str, Any]:
    return {"Segmentation": SEMANTIC, "Boundaries": boundaries(20), "CategoriesPresent": np.unique(SEMANTIC)} | changes


def gt_inst(**changes: Any) -> dict[str, Any]:
    return {"Segmentation": INSTANCES, "Boundaries": boundaries(4), "Categories": CATEGORIES} | changes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`dataset` of a benchmark with four images, two in each list."""
    folder = tmp_path / "benchmark/dataset"
    for name in ("img", "cls", "inst"):
        (folder / name).mkdir(parents=True)
    for image_id in ("a", "b", "c", "d"):
        Image.fromarray(np.full((*SIZE, 3), ord(image_id), np.uint8)).save(folder / f"img/{image_id}.jpg", quality=100)
        savemat(folder / f"cls/{image_id}.mat", {"GTcls": gt_cls()}, do_compression=True)
        savemat(folder / f"inst/{image_id}.mat", {"GTinst": gt_inst()}, do_compression=True)
    (folder / "train.txt").write_text("a\nb\n")
    (folder / "val.txt").write_text("d\nc\n")
    return folder


@pytest.fixture
def voc(tmp_path: Path) -> VocDevkit:
    """Trains on b, which SBD has, and x; validates on c, which SBD has, and y. Its masks have a void border."""
    folder = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    mask = np.full(SIZE, 255, np.uint8)
    mask[1:-1, 1:-1] = 1
    for image_id in ("b", "c", "x", "y", "z"):
        Image.new("RGB", (SIZE[1], SIZE[0])).save(folder / f"JPEGImages/{image_id}.jpg")
        for name in ("SegmentationClass", "SegmentationObject"):
            Image.fromarray(mask).save(folder / f"{name}/{image_id}.png")
    (folder / "ImageSets/Segmentation/train.txt").write_text("b\nx\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("c\ny\n")
    return open_devkit(folder)


def test_an_image_and_its_masks_are_those_written(root: Path) -> None:
    source, item = SbdFolder(StoragePath.of(root)), Item("b", "sbd")
    image = source.read_image(item)
    assert np.unique(image.pixels).tolist() == [ord("b")]
    assert image.content == (root / "img/b.jpg").read_bytes()
    semantic, instances, labels = source.read_truth(item, SIZE) or pytest.fail("no truth")
    np.testing.assert_array_equal(semantic, SEMANTIC)
    np.testing.assert_array_equal(instances, INSTANCES)
    assert labels.tolist() == [15, 0, 15, 20]
    assert (semantic.dtype, instances.dtype, labels.dtype) == (np.uint8, np.int32, np.int64)
    files = [file.local for file in source.files(item)]
    assert files == [root / "img/b.jpg", root / "cls/b.mat", root / "inst/b.mat"]


def test_matlab_numbers_may_be_floats_and_uncompressed(root: Path) -> None:
    numbers = gt_inst(Segmentation=INSTANCES.astype(np.float64), Categories=CATEGORIES.astype(np.float64))
    savemat(root / "inst/a.mat", {"GTinst": numbers})
    truth = SbdFolder(StoragePath.of(root)).read_truth(Item("a", "sbd"), SIZE)
    assert truth is not None
    np.testing.assert_array_equal(truth.instances, INSTANCES)
    assert truth.instance_labels.tolist() == [15, 0, 15, 20]


def test_an_image_without_objects_and_one_with_a_single_one(root: Path) -> None:
    """MATLAB drops dimensions of length 1."""
    empty = np.zeros(SIZE, np.uint8)
    savemat(root / "inst/a.mat", {"GTinst": gt_inst(Segmentation=empty, Categories=np.zeros((0, 0)))})
    savemat(root / "inst/b.mat", {"GTinst": gt_inst(Segmentation=(INSTANCES == 3).astype(np.uint8), Categories=15)})
    source = SbdFolder(StoragePath.of(root))
    for image_id, labels in (("a", []), ("b", [15])):
        truth = source.read_truth(Item(image_id, "sbd"), SIZE)
        assert truth is not None
        assert truth.instance_labels.tolist() == labels


def test_splits(root: Path, voc: VocDevkit) -> None:
    (root / "train_noval.txt").write_text("a\n")
    expected = {"train": ["a", "b"], "val": ["c", "d"], "all": ["a", "b", "c", "d"], "train_noval": ["a"]}
    for split, ids in expected.items():
        for place in (root, root.parent):
            listing = list_sbd(place, split, voc)
            assert [item.image_id for item in listing.items] == ids
            assert {item.source for item in listing.items} == {"sbd"}
            assert listing.known_ids == {"a", "b", "c", "d"}
            assert listing.quarantined == []


def test_trainaug_takes_the_masks_of_voc_where_it_has_some(root: Path, voc: VocDevkit) -> None:
    listing = list_sbd(root, "trainaug", voc)
    assert [(item.image_id, item.source) for item in listing.items] == [
        ("a", "sbd"), ("b", "voc"), ("d", "sbd"), ("x", "voc"),
    ]  # fmt: skip
    assert listing.known_ids == {"a", "b", "c", "d", "x", "y", "z"}
    for item in listing.items:
        image = listing.source.read_image(item)
        truth = listing.source.read_truth(item, image.pixels.shape[:2])
        assert truth is not None
        assert (image.pixels == 0).all() == (item.source == "voc")
        assert (truth.semantic == 255).any() == (truth.instances == -1).any() == (item.source == "voc")
    assert [file.local for file in listing.source.files(listing.items[1])] == [
        file.local for file in voc.files(Item("b", "voc"))
    ]


def write_lists(root: Path, voc: VocDevkit) -> None:
    """As many images as published: of VOC's 1464 to train on, SBD has 1134, and of its 1449 to validate on, 1103."""
    ids = [f"{k:05d}" for k in range(11355)]
    folder = Path(voc.root.key)
    lists = {
        root / "train.txt": ids[:8498],
        root / "val.txt": ids[8498:],
        root / "train_noval.txt": ids[:5623],
        folder / "ImageSets/Segmentation/train.txt": ids[:1134] + [f"t{k}" for k in range(330)],
        folder / "ImageSets/Segmentation/val.txt": ids[-1103:] + [f"v{k}" for k in range(346)],
    }
    for path, names in lists.items():
        path.write_text("\n".join(names))


def test_the_whole_set_has_the_published_numbers(root: Path, voc: VocDevkit) -> None:
    write_lists(root, voc)
    expected = {"train": 8498, "val": 2857, "train_noval": 5623, "all": 11355, "trainaug": 10582}
    assert {split: len(list_sbd(root, split, voc).items) for split in expected} == expected
    listing = list_sbd(root, "trainaug", voc)
    assert sum(item.source == "sbd" for item in listing.items) == 10252 - 1134
    assert not {item.image_id for item in listing.items} & set(voc.image_ids("val")[0])


def test_another_number_is_an_error_where_sbd_is_whole(root: Path, voc: VocDevkit) -> None:
    write_lists(root, voc)
    path = Path(voc.root.key) / "ImageSets/Segmentation/val.txt"
    path.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match="split trainaug: expected 10582 images, got 10583"):
        list_sbd(root, "trainaug", voc)
    (root / "train_noval.txt").write_text("00001\n")
    with pytest.raises(ValueError, match="split train_noval: expected 5623 images, got 1"):
        list_sbd(root, "train_noval")


def test_names_what_is_missing(root: Path, voc: VocDevkit, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected img/, cls/, inst/, train\.txt, val\.txt in .*/none"):
        list_sbd(tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match="train_noval"):
        list_sbd(root, "train_noval")
    with pytest.raises(ValueError, match=r"split: expected one of train, val, .*, got 'test'"):
        list_sbd(root, "test")
    with pytest.raises(ValueError, match=r"trainaug: expected a VOC devkit .* got none; set --devkit"):
        list_sbd(root, "trainaug")
    with pytest.raises(ValueError, match=r"trainaug: expected a VOC devkit .* got one with classes"):
        list_sbd(root, "trainaug", replace(voc, classes=("background", "cell")))
    shutil.rmtree(root / "cls")
    with pytest.raises(FileNotFoundError, match="expected cls/ in"):
        list_sbd(root, "train")


def test_ids_that_repeat_or_leave_the_folder_are_set_aside(root: Path, voc: VocDevkit) -> None:
    (root / "train.txt").write_text("a\n../../secret\nb\na\n")
    for split in ("train", "all", "trainaug"):
        listing = list_sbd(root, split, voc)
        assert {(row.image_id, row.file) for row in listing.quarantined} == {
            ("../../secret", "train.txt"), ("a", "train.txt"),
        }  # fmt: skip
        assert {item.image_id for item in listing.items} >= {"a", "b"}
    assert list_sbd(root, "val").quarantined == []


NEGATIVE = INSTANCES.astype(np.int16)
NEGATIVE[0, 0] = -1


@pytest.mark.parametrize(
    ("folder", "content", "reason"),
    [
        ("cls", None, "file is missing"),
        ("cls", b"", "."),
        ("cls", b"MATLAB 5.0" + b"\0" * 200, "."),
        ("cls", {"GTinst": gt_inst()}, "no struct GTcls in it"),
        ("cls", {"GTcls": SEMANTIC}, "no struct GTcls in it"),
        ("cls", {"GTcls": {"Boundaries": 1}}, r"no field GTcls\.Segmentation; got Boundaries"),
        ("cls", {"GTcls": gt_cls(Segmentation=SEMANTIC.T)}, r"GTcls\.Segmentation of another size: .* got \(40, 30"),
        ("cls", {"GTcls": gt_cls(Segmentation=SEMANTIC + 1)}, r"GTcls\.Segmentation: expected integers 0\.\.20"),
        ("cls", {"GTcls": gt_cls(Segmentation=SEMANTIC + 0.5)}, r"GTcls\.Segmentation: expected integers"),
        ("cls", {"GTcls": gt_cls(Segmentation=SEMANTIC * np.nan)}, r"GTcls\.Segmentation: expected integers"),
        ("cls", {"GTcls": gt_cls(Segmentation=boundaries(20))}, r"GTcls\.Segmentation: expected an array of real num"),
        ("inst", None, "file is missing"),
        ("inst", {"GTinst": {"Segmentation": INSTANCES}}, r"no field GTinst\.Categories; got Segmentation"),
        ("inst", {"GTinst": gt_inst(Segmentation=INSTANCES[:-1])}, r"GTinst\.Segmentation of another size"),
        ("inst", {"GTinst": gt_inst(Categories=CATEGORIES[:-1])}, r"GTinst\.Segmentation: expected integers 0\.\.3"),
        ("inst", {"GTinst": gt_inst(Segmentation=NEGATIVE)}, r"GTinst\.Segmentation: expected integers 0\.\.4"),
        ("inst", {"GTinst": gt_inst(Categories=CATEGORIES * 0)}, r"GTinst\.Categories: expected integers 1\.\.20"),
        ("inst", {"GTinst": gt_inst(Categories=CATEGORIES + 1)}, r"GTinst\.Categories: expected integers 1\.\.20"),
        ("inst", {"GTinst": gt_inst(Categories="cat")}, r"GTinst\.Categories: expected an array of real numbers"),
        ("inst", {"GTinst": gt_inst(Segmentation=csc_matrix(INSTANCES))}, r"GTinst\.Segmentation: expected an array"),
        ("inst", bomb(), "decompression bomb: more than 16 MiB once inflated"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(root: Path, folder: str, content: bytes | dict[str, Any] | None, reason: str) -> None:
    path = root / folder / "a.mat"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        savemat(path, content)
    with pytest.raises(CorruptItemError, match=reason) as caught:
        SbdFolder(StoragePath.of(root)).read_truth(Item("a", "sbd"), SIZE)
    assert (caught.value.row.image_id, caught.value.row.file) == ("a", f"{folder}/a.mat")
    assert str(root) not in str(caught.value)


def test_a_bad_photograph_is_named(root: Path) -> None:
    (root / "img/a.jpg").write_bytes((root / "img/a.jpg").read_bytes()[:300])
    with pytest.raises(CorruptItemError, match=r"a: img/a\.jpg: damaged image"):
        SbdFolder(StoragePath.of(root)).read_image(Item("a", "sbd"))


def test_damaged_bytes_give_masks_in_range_or_a_quarantined_item(root: Path) -> None:
    source, whole = SbdFolder(StoragePath.of(root)), (root / "inst/a.mat").read_bytes()
    rng, num_bad = np.random.default_rng(0), 0
    for index in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(128, len(whole), 3)] ^= rng.integers(1, 256, 3, np.uint8)
        cut = rng.integers(len(whole)) if index % 4 == 3 else None
        (root / "inst/a.mat").write_bytes(damaged[:cut].tobytes())
        try:
            truth = source.read_truth(Item("a", "sbd"), SIZE)
        except CorruptItemError:
            num_bad += 1
        else:
            assert truth is not None
            assert truth.instances.max() <= truth.instance_labels.size
            assert truth.instance_labels.max() <= 20
    assert num_bad > 100
