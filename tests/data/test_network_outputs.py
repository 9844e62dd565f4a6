from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instseg.data.network_outputs import DetectionRecord, import_detections, read_detections, read_logits
from instseg.data.quarantine import CorruptItemError

SIZE, NUM_LABELS = (60, 80), 21  # height, width
CATEGORIES = {label: label for label in range(1, NUM_LABELS)}
GOOD: dict[str, Any] = {"image_id": "a", "category_id": 20, "bbox": [10.5, 20, 30, 25.25], "score": 0.5}


def test_good_detections_keep_their_order_and_values() -> None:
    entries = [GOOD, GOOD | {"score": 0.04}, GOOD | {"category_id": 1, "score": 1}, GOOD | {"score": 0}]
    records = [DetectionRecord(f"d[{index}]", entry) for index, entry in enumerate(entries)]
    detections, bad = import_detections("a", records, SIZE, CATEGORIES, min_score=0.05)
    assert bad == []
    assert detections.labels.tolist() == [20, 1]
    assert detections.scores.tolist() == [0.5, 1.0]
    np.testing.assert_allclose(detections.boxes[0], [10.5, 20, 40.5, 45.25])
    assert len(import_detections("a", records, SIZE, CATEGORIES, min_score=0)[0]) == 3  # a score of 0 is never kept


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category_id": 0}, r"one of the 20 categories in 1\.\.20, got 0"),
        ({"category_id": 21}, r"one of the 20 categories in 1\.\.20, got 21"),
        ({"category_id": True}, "one of the 20 categories"),
        ({"category_id": 1.0}, "one of the 20 categories"),
        ({"score": float("nan")}, r"expected a number in \[0, 1\], got nan"),
        ({"score": 1.01}, "got 1.01"),
        ({"score": -0.1}, "got -0.1"),
        ({"score": "0.5"}, "got '0.5'"),
        ({"score": None}, "got None"),
        ({"bbox": [1, 2, 3]}, "expected four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "expected four finite numbers"),
        ({"bbox": [1, 2, 0, 3]}, "expected width and height > 0"),
        ({"bbox": [80, 2, 5, 5]}, "expected a box in the 80x60 image"),
        ({"bbox": [70, 50, 40, 40]}, "mostly outside"),
        ({"bbox": [-500, 0, 510, 20]}, "mostly outside"),
        ({"bbox": None}, "expected four finite numbers"),
        ({"bbox": [79.99999999, 10, 1e-8, 20]}, r"boxes\[0\]: expected finite x0 < x1"),
        ({"bbox": [10**400, 10, 5, 20]}, "expected four finite numbers"),
        ({"bbox": [10, 10, float("inf"), 20]}, "expected four finite numbers"),
        ({"score": 10**400}, r"expected a number in \[0, 1\], got 1000"),
        ({"score": [[[]]]}, r"got \[\[\[\]\]\]"),
    ],
)
def test_a_bad_detection_is_dropped_alone(change: dict[str, Any], reason: str) -> None:
    records = [DetectionRecord("d.json[7]", GOOD | change), DetectionRecord("d.json[8]", GOOD)]
    detections, bad = import_detections("a", records, SIZE, CATEGORIES, min_score=0.05)
    assert len(detections) == 1
    (row,) = bad
    assert (row.image_id, row.file) == ("a", "d.json[7]")
    assert re.search(reason, row.reason)


def test_a_score_that_float32_makes_zero_is_bad_where_it_would_count() -> None:
    record = DetectionRecord("d", GOOD | {"score": 1e-50})
    detections, bad = import_detections("a", [record], SIZE, CATEGORIES, min_score=0)
    assert len(detections) == 0
    assert "expected a confidence in (0, 1], got 0.0" in bad[0].reason
    assert import_detections("a", [record], SIZE, CATEGORIES, min_score=0.05)[1] == []


def test_a_box_that_overshoots_the_image_is_clipped() -> None:
    record = DetectionRecord("d", GOOD | {"bbox": [-4, 50.5, 100, 12]})
    detections, bad = import_detections("a", [record], SIZE, CATEGORIES, min_score=0)
    assert bad == []
    np.testing.assert_array_equal(detections.boxes, np.array([[0, 50.5, 80, 60]], np.float32))
    detections.check_image(*SIZE, NUM_LABELS)


def test_no_detection_at_all() -> None:
    detections, bad = import_detections("a", [], SIZE, CATEGORIES, min_score=0)
    assert (len(detections), bad) == (0, [])
    assert detections.boxes.shape == (0, 4)


def test_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, GOOD | {"image_id": 7}, {"score": 1}, 3, GOOD]))
    records, orphans = read_detections(str(path))
    assert [record.file for record in records["a"]] == ["results.json[0]", "results.json[4]"]
    assert len(records["7"]) == 1
    assert [row.file for row in orphans] == ["results.json[2]", "results.json[3]"]


def test_a_number_of_thousands_of_digits_is_bad_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, GOOD | {"score": 17}]).replace("17", "1" * 5000))
    records, _ = read_detections(str(path))
    detections, bad = import_detections("a", records["a"], SIZE, CATEGORIES, min_score=0)
    assert len(detections) == 1
    assert [row.file for row in bad] == ["results.json[1]"]


def test_a_results_file_that_is_none_raises_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match=r"results\.json: no such file"):
        read_detections(str(path))
    path.write_text("[{")
    with pytest.raises(ValueError, match="not a JSON file"):
        read_detections(str(path))
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"results\.json: expected a list of objects, got .* nested too deeply"):
        read_detections(str(path))
    path.write_bytes(b'[{"image_id": "\xff"}]')
    with pytest.raises(ValueError, match=r"results\.json: not a JSON file"):
        read_detections(str(path))
    path.write_text('{"annotations": []}')
    with pytest.raises(ValueError, match=r"expected a list of .*, got dict"):
        read_detections(str(path))


def test_logits_round_trip(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float16)
    np.savez_compressed(tmp_path / "a.npz", logits=logits)
    np.testing.assert_array_equal(read_logits(str(tmp_path), "a", 4), logits)


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (np.zeros((5, 3, 5), np.float16), r"expected shape \(4, h, w\) for 4 labels, got \(5, 3, 5\)"),
        (np.zeros((4, 3), np.float16), "expected shape"),
        (np.zeros((4, 0, 5), np.float16), "expected shape"),
        (np.zeros((4, 3, 5), np.int64), "expected floating-point values"),
        (np.full((4, 3, 5), np.nan, np.float16), "got 60 others"),
        (np.full((4, 1, 1), 1e6, np.float32), "within float16, got 4 others"),
        (np.full((4, 3, 5), None, object), "expected floating-point values, got object"),
    ],
)
def test_bad_logits_are_named(tmp_path: Path, logits: np.ndarray, reason: str) -> None:
    np.savez(tmp_path / "a.npz", logits=logits)
    with pytest.raises(CorruptItemError, match=reason):
        read_logits(str(tmp_path), "a", 4)


def test_damaged_logits_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(CorruptItemError, match="file is missing"):
        read_logits(str(tmp_path), "a", 4)
    np.savez(path, scores=np.zeros((4, 3, 5)))
    with pytest.raises(CorruptItemError, match="expected an array named 'logits'"):
        read_logits(str(tmp_path), "a", 4)
    np.savez(path, logits=np.zeros((4, 3, 5)))
    whole = path.read_bytes()
    for num_bytes in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(CorruptItemError) as caught:
            read_logits(str(tmp_path), "a", 4)
        assert caught.value.row.file == f"{tmp_path.name}/a.npz"
        assert str(tmp_path) not in caught.value.row.reason
    path.write_bytes(whole[:120] + bytes(20) + whole[140:])
    with pytest.raises(CorruptItemError):
        read_logits(str(tmp_path), "a", 4)


def test_a_header_may_not_claim_what_the_file_does_not_hold(tmp_path: Path) -> None:
    """No memory is taken for it: numpy would try to."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (21, 10**6, 10**6)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("logits.npy", header.getvalue() + bytes(100))
    with pytest.raises(
        CorruptItemError, match=r"expected .* 168000000000000 for shape \(21, 1000000, 1000000\), got 100"
    ):
        read_logits(str(tmp_path), "a", 21)


def test_logits_of_gigabytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instseg.data.network_outputs._MAX_LOGITS_BYTES", 4 * 3 * 5 * 2)
    np.savez(tmp_path / "a.npz", logits=np.zeros((4, 3, 5), np.float16))
    assert read_logits(str(tmp_path), "a", 4).shape == (4, 3, 5)
    np.savez(tmp_path / "a.npz", logits=np.zeros((4, 3, 6), np.float16))
    with pytest.raises(CorruptItemError, match="at most 120 bytes"):
        read_logits(str(tmp_path), "a", 4)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("plain .npy", "not a zip file"),
        ("encrypted", "RuntimeError: .* encrypted"),
        ("unknown compression", "NotImplementedError: .* compression"),
        ("a folder", "Is a directory"),
    ],
)
def test_whatever_a_zip_file_raises_is_of_this_item(tmp_path: Path, damage: str, reason: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, logits=np.zeros((4, 3, 5)))
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    if damage == "encrypted":
        content[directory + 8] |= 1
    if damage == "unknown compression":
        content[directory + 10] = 77
    path.write_bytes(content)
    if damage == "plain .npy":
        with path.open("wb") as file:
            np.save(file, np.zeros((4, 3, 5)))
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    with pytest.raises(CorruptItemError, match=reason) as caught:
        read_logits(str(tmp_path), "a", 4)
    assert caught.value.row.file == f"{tmp_path.name}/a.npz"
    assert str(tmp_path) not in caught.value.row.reason
