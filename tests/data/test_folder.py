from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.data.folder import list_folder
from instseg.data.quarantine import CorruptItemError
from instseg.storage import StoragePath
from tests.s3 import S3

CLASSES = ("background", "ball", "brick")
FILES = ("a.jpg", "b/c d.JPEG", "b/deep/e.PNG", "b/.hidden.jpg", ".cache/f.jpg", "notes.txt", "b/film.gif")
IDS = ["a", "b__c_d", "b__deep__e"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "album" / name, "PNG" if name.lower().endswith("png") else "JPEG")
    return tmp_path / "album"


def ids_of(place: Path | str | StoragePath) -> list[str]:
    return [item.image_id for item in list_folder(place, CLASSES).items]


def test_a_folder_is_read_with_all_below_it(root: Path) -> None:
    listing = list_folder(root, CLASSES)
    assert [item.image_id for item in listing.items] == IDS
    assert [item.record["file_name"] for item in listing.items] == ["a.jpg", "b/c d.JPEG", "b/deep/e.PNG"]
    assert {item.source for item in listing.items} == {"folder"}
    assert (listing.known_ids, listing.quarantined) == (frozenset(IDS), [])
    assert (listing.source.classes, listing.source.categories) == (CLASSES, {1: 1, 2: 2})
    for item in listing.items:
        assert json.loads(json.dumps(item.record)) == item.record
        assert listing.source.read_image(item).pixels.shape == (6, 8, 3)
        assert listing.source.read_truth(item, (6, 8)) is None
        assert [file.local for file in listing.source.files(item)] == [root / item.record["file_name"]]


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("*.jpg", ["a"]),
        ("*", ["a"]),
        ("*/*", ["b__c_d"]),
        ("**", IDS),
        ("**/*", IDS),
        ("**/**/*", IDS),
        ("b/**/*.PNG", ["deep__e"]),  # below the folder before the first wildcard
        ("[ab]/d??p/*", ["b__deep__e"]),
        ("b/.hid*", []),
        ("a.jpg", ["a"]),
        ("b/c d.JPEG", ["c_d"]),
    ],
)
def test_a_glob_or_a_file(root: Path, pattern: str, ids: list[str]) -> None:
    if pattern == "b/.hid*":  # asked for by name, but no id begins with a dot
        assert [row.reason for row in list_folder(root / pattern, CLASSES).quarantined] == [
            "id is not a plain file name"
        ]
    assert ids_of(f"{root}/{pattern}") == ids
    if "?" not in pattern:  # which begins a URI's options
        assert ids_of(f"file://{root}/{pattern}") == ids


def test_names_with_wildcards_that_exist_are_themselves(root: Path) -> None:
    (root / "a.jpg").rename(root / "a[1].jpg")
    (root / "a1.jpg").write_bytes(b"another")
    assert ids_of(root / "a[1].jpg") == ["a_1_"]
    (root / "b").rename(root / "b[x]")
    assert ids_of(root / "b[x]") == ["c_d", "deep__e"]


def test_an_object_store(root: Path, s3: S3) -> None:
    place = StoragePath.of(s3("album"))
    for name in FILES:
        (place / name).publish((root / name).read_bytes())
    assert ids_of(place) == IDS
    listing = list_folder(place, CLASSES)
    assert listing.source.read_image(listing.items[1]).content == (root / "b/c d.JPEG").read_bytes()
    assert ids_of(place / "b" / "*.JPEG") == ["c_d"]
    assert ids_of(place / "a.jpg") == ["a"]


def test_the_number_of_other_files_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list_folder(root, CLASSES)
    assert [record.message for record in caplog.records] == [
        f"images {root}: 2 files are not looked at: no .jpg, .jpeg, .png"
    ]
    caplog.clear()
    list_folder(root / "*.jpg", CLASSES)
    assert not caplog.records


def test_nothing_to_look_at_is_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images .*none: no \.jpg, \.jpeg, \.png there, and 0 other files"):
        list_folder(tmp_path / "none", CLASSES)
    with pytest.raises(FileNotFoundError, match="1 other files"):
        list_folder(root / "*.txt", CLASSES)


def test_of_two_with_one_id_the_second_is_set_aside(root: Path) -> None:
    (root / "a.png").write_bytes(b"x")
    (root / "b__deep__e.png").write_bytes(b"x")
    listing = list_folder(root, CLASSES)
    assert [(item.image_id, item.record["file_name"]) for item in listing.items] == [
        ("a", "a.jpg"), ("b__c_d", "b/c d.JPEG"), ("b__deep__e", "b/deep/e.PNG"),
    ]  # fmt: skip
    assert [(row.image_id, row.file, row.reason) for row in listing.quarantined] == [
        ("a", "a.png", "has the same id as another file: a.jpg"),
        ("b__deep__e", "b__deep__e.png", "has the same id as another file: b/deep/e.PNG"),
    ]


def test_linked_folders_are_not_entered(root: Path) -> None:
    (root / "b/loop").symlink_to(root)
    assert ids_of(root) == IDS


def test_a_photograph_is_turned_as_its_exif_orientation_says(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    (root / "a.jpg").write_bytes(buffer.getvalue())  # what a file is, its bytes say
    listing = list_folder(root / "a.jpg", CLASSES)
    image = listing.source.read_image(listing.items[0])
    np.testing.assert_array_equal(image.pixels, np.rot90(pixels, -1))
    assert image.notes == ("rotated as its EXIF orientation says",)


def test_a_bad_photograph_is_named(root: Path) -> None:
    (root / "a.jpg").write_bytes(b"GIF89a")
    listing = list_folder(root, CLASSES)
    with pytest.raises(CorruptItemError, match=r"^a: a\.jpg: neither a JPEG nor a PNG file"):
        listing.source.read_image(listing.items[0])
