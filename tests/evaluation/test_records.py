from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.records import FORMAT_VERSION, SCHEMA, read_records, write_records
from instseg.evaluation.semantic import Confusion


def some_records() -> list[ImageRecord]:
    """Of 0 to 3 predictions, true instances and detections."""
    rng = np.random.default_rng(0)
    return [
        ImageRecord(
            image_id=f"bild_ä{index}",
            labels=rng.integers(1, 4, num),
            scores=rng.random(num),
            iou=rng.random((num, 3 - num)),
            truth_labels=rng.integers(1, 4, 3 - num),
            confusion_before=Confusion.of(rng.integers(0, 2**60, (4, 4)) * (rng.random((4, 4)) < num / 3)),
            confusion_after=Confusion.of(rng.integers(0, 3, (4, 4))),
            pixels=rng.integers(1, 90, num),
            void_pixels=rng.integers(0, 9, num),
            truth_pixels=rng.integers(1, 90, 3 - num),
            detection_labels=rng.integers(1, 4, index % 3),
            detection_scores=rng.random(index % 3),
            validity=rng.random(index % 3),
            matched=rng.random(index % 3) < 0.5,
        )
        for index, num in enumerate([2, 0, 3, 1])
    ]


def assert_same(first: list[ImageRecord], second: list[ImageRecord]) -> None:
    np.testing.assert_equal([vars(record) for record in first], [vars(record) for record in second])
    assert [dtypes(record) for record in first] == [dtypes(record) for record in second]


def dtypes(record: ImageRecord) -> list[np.dtype]:
    values = [*vars(record).values(), *record.confusion_before, *record.confusion_after]
    return [value.dtype for value in values if isinstance(value, np.ndarray)]


def test_what_is_written_is_read_to_the_bit_and_in_order(tmp_path: Path) -> None:
    records = some_records()
    write_records(tmp_path / "a.arrow", records)
    assert_same(read_records(tmp_path / "a.arrow"), records)
    write_records(tmp_path / "b.arrow", read_records(tmp_path / "a.arrow"))
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
    write_records(tmp_path / "none.arrow", [])
    assert read_records(tmp_path / "none.arrow") == []


def test_the_file_has_every_field_of_a_record() -> None:
    assert SCHEMA.names == [field.name for field in fields(ImageRecord)]


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    path, records = tmp_path / "records.arrow", some_records()
    write_records(path, records)
    content, num_noticed = path.read_bytes(), 0
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            found = read_records(path)
        except ValueError:
            num_noticed += 1
        else:
            assert_same(found, records)  # padding between the values
    assert num_noticed > len(content) / 74
    for size in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="damaged, or not an Arrow file"):
            read_records(path)


@pytest.mark.parametrize("path_in_record", [("num_labels",), ("places", 0), ("counts", -1)])
def test_a_confusion_other_than_the_one_written_is_damage(tmp_path: Path, path_in_record: tuple) -> None:
    """A file that is well-formed, with one number changed."""
    path = tmp_path / "records.arrow"
    write_records(path, some_records())
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        table = reader.read_all()
    column = table["confusion_after"].to_pylist()
    *places, last = path_in_record
    part = column[2]
    for place in places:
        part = part[place]
    part[last] += 1
    number = table.schema.get_field_index("confusion_after")
    changed = table.set_column(number, SCHEMA.field(number), pa.array(column, SCHEMA.field(number).type))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(changed)
    with pytest.raises(ValueError, match="damaged: its values are not those that were written"):
        read_records(path)


def test_the_file_grows_with_the_entries_of_confusions_alone(tmp_path: Path) -> None:
    """Of 21 or 1000 labels, the numbers are the same."""
    sizes = []
    for num_labels in (21, 1000):
        few = Confusion(num_labels, np.array([0, 7], np.int64), np.array([5, 2**40], np.int64))
        records = [replace(record, confusion_before=few, confusion_after=few) for record in some_records()]
        write_records(tmp_path / "records.arrow", records)
        assert_same(read_records(tmp_path / "records.arrow"), records)
        sizes.append((tmp_path / "records.arrow").stat().st_size)
    assert sizes[1] == pytest.approx(sizes[0], abs=64)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"beside a result's results\.json"):
        read_records(tmp_path / "missing.arrow")
    path = tmp_path / "foreign.arrow"
    path.write_text("{}")
    with pytest.raises(ValueError, match="damaged, or not an Arrow file"):
        read_records(path)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA):
        pass
    with pytest.raises(ValueError, match=f"expected records of format {FORMAT_VERSION}, got none"):
        read_records(path)
    for version in (2, 99):
        other = SCHEMA.with_metadata({"instseg.records.version": f"{version}"})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, other):
            pass
        with pytest.raises(ValueError, match=f"got {version}; evaluate again"):
            read_records(path)
