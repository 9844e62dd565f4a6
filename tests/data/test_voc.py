from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.data.images import decode_image
from instseg.data.quarantine import CorruptItemError
from instseg.data.source import Item
from instseg.data.voc import instance_classes, open_devkit
from tests.data.conftest import NAMES

ITEM = Item("scene_00001", "voc")


@pytest.mark.real_data
def test_real_images_and_masks_are_what_pillow_reads(shared_data: Path) -> None:
    devkit = open_devkit(str(shared_data / "VOCdevkit"))
    for item in devkit.list_split("val").items[::12]:
        image = devkit.read_image(item).pixels
        truth = devkit.read_truth(item, image.shape[:2])
        assert truth is not None
        semantic, instances, labels = truth

        def read(folder: str, suffix: str, image_id: str = item.image_id) -> np.ndarray:
            with Image.open(f"{devkit.root}/{folder}/{image_id}{suffix}") as file:
                return np.array(file)

        np.testing.assert_array_equal(image, read("JPEGImages", ".jpg"))
        np.testing.assert_array_equal(semantic, read("SegmentationClass", ".png"))
        objects = read("SegmentationObject", ".png")
        np.testing.assert_array_equal(instances == -1, objects == 255)
        np.testing.assert_array_equal(instances[instances != -1], objects[objects != 255])
        for instance in np.unique(objects[(objects > 0) & (objects < 255)]):
            classes, counts = np.unique(semantic[objects == instance], return_counts=True)
            assert labels[instance - 1] == classes[counts.argmax()]


def test_opens_the_folder_itself_or_the_one_below(devkit: Path, tmp_path: Path) -> None:
    assert open_devkit(str(devkit)).root.local == devkit
    shutil.copytree(devkit, tmp_path / "VOC2012")
    assert open_devkit(str(tmp_path)).root.local == tmp_path / "VOC2012"
    (tmp_path / "VOC2007").mkdir()
    with pytest.raises(ValueError, match=r"name one of .*VOC2007, .*VOC2012"):
        open_devkit(str(tmp_path))


def test_names_what_is_missing(devkit: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_devkit(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="JPEGImages"):
        open_devkit(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="splits that exist: train, val"):
        open_devkit(devkit).list_split("test")


@pytest.mark.parametrize("text", ["", "../secret\n", "..\n", ".hidden\n", "a/b\n"])
def test_refuses_a_split_without_ids(devkit: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ImageSets/Segmentation/odd.txt").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.txt: expected one image id a line, got none"):
        open_devkit(tmp_path).list_split("odd")


def test_strange_ids_are_set_aside(devkit: Path, tmp_path: Path) -> None:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ImageSets/Segmentation/odd.txt").write_text("b 1\na\n../b\nb -1\n")
    listing = open_devkit(tmp_path).list_split("odd")
    assert [item.image_id for item in listing.items] == ["a", "b"]
    assert [str(row) for row in listing.quarantined] == [
        "../b: odd.txt: id is not a plain file name",
        "b: odd.txt: id is there 2 times; taken once",
    ]
    assert listing.known_ids >= {"a", "b", "scene_00001"}


def test_a_split_that_is_no_text_is_named(devkit: Path, tmp_path: Path) -> None:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ImageSets/Segmentation/odd.txt").write_bytes("scene_00001\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"odd\.txt: expected text in UTF-8"):
        open_devkit(tmp_path).list_split("odd")
    (tmp_path / "ImageSets/Segmentation/odd.txt").write_text("scene_00001\r\n", "utf-8-sig")  # as Windows writes it
    assert open_devkit(tmp_path).list_split("odd").items == [ITEM]


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), RuntimeError("odd"), KeyError("x")])
def test_whatever_an_image_raises_is_of_this_image(
    devkit: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(content: bytes) -> None:
        raise error

    monkeypatch.setattr("instseg.data.voc.decode_image", fail)
    monkeypatch.setattr("instseg.data.images.decode_image", fail)
    with pytest.raises(CorruptItemError, match=type(error).__name__) as caught:
        open_devkit(devkit).read_image(ITEM)
    assert caught.value.row.file == "JPEGImages/scene_00001.jpg"
    with pytest.raises(CorruptItemError, match=type(error).__name__) as caught:
        open_devkit(devkit).read_truth(ITEM, (64, 96))
    assert caught.value.row.file == "SegmentationClass/scene_00001.png"


def test_images_without_masks_are_test_images(devkit: Path, tmp_path: Path) -> None:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    listing = open_devkit(tmp_path).list_split("val")
    assert listing.source.read_truth(listing.items[0], (64, 96)) is not None
    for folder in ("SegmentationClass", "SegmentationObject"):
        shutil.rmtree(tmp_path / folder)
    listing = open_devkit(tmp_path).list_split("val")
    assert listing.source.read_truth(listing.items[0], (64, 96)) is None


def _png(mode: str, size: tuple[int, int], value: int | tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "file is missing"),
        (b"", "neither a JPEG nor a PNG"),
        (b"GIF89a", "neither a JPEG nor a PNG"),
        (_png("L", (96, 64), 1)[:-30], "damaged image"),
        (_png("RGB", (96, 64), (128, 0, 0)), "expected an indexed PNG, got mode RGB"),
        (_png("L", (95, 64), 1), "expected the image's 96x64 pixels, got 95x64"),
        (_png("L", (96, 64), 6), r"expected classes 0\.\.5 and 255, got \[6\]"),
    ],
)
def test_a_bad_mask_is_named(devkit: Path, tmp_path: Path, content: bytes | None, reason: str) -> None:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "SegmentationClass/scene_00001.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorruptItemError, match=reason) as caught:
        open_devkit(tmp_path, NAMES).read_truth(ITEM, (64, 96))
    assert (caught.value.row.image_id, caught.value.row.file) == ("scene_00001", "SegmentationClass/scene_00001.png")
    assert str(tmp_path) not in str(caught.value)


def test_decompression_bombs_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 20):  # Pillow warns of the first and refuses the second
        with pytest.raises(ValueError, match="bomb"):
            decode_image(_png("L", (side, side), 0))


def test_class_of_an_instance_ignores_void_and_background() -> None:
    semantic = np.array([[255, 255, 255, 4, 0, 0], [0, 0, 0, 7, 7, 2]], np.uint8)
    instances = np.array([[1, 1, 1, 1, 0, -1], [0, 3, 3, 3, 3, 3]], np.int32)
    assert instance_classes(semantic, instances).tolist() == [4, 0, 7]
    with pytest.raises(ValueError, match="instance 1 has no class"):
        instance_classes(np.full((1, 2), 255, np.uint8), np.ones((1, 2), np.int32))
