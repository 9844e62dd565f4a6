from __future__ import annotations

from pathlib import Path

import pytest

from instseg.data.quarantine import CorruptItemError, QuarantineRow, read_quarantine, write_quarantine


def test_rows_survive(tmp_path: Path) -> None:
    rows = [QuarantineRow("b", "f", "r"), QuarantineRow("a", "g", "s")]
    write_quarantine(tmp_path / "q.parquet", rows)
    assert read_quarantine(tmp_path / "q.parquet") == sorted(rows)


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    """JSON may hold one, Parquet may not."""
    write_quarantine(tmp_path / "q.parquet", [QuarantineRow("\ud800", "detections.json[0]", "no such image")])
    assert read_quarantine(tmp_path / "q.parquet")[0].image_id == "\\ud800"


def test_a_missing_or_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    with pytest.raises(FileNotFoundError, match=r"No such file.*q\.parquet"):
        read_quarantine(path)
    write_quarantine(path, [QuarantineRow("a", "f", "reason")])
    path.write_bytes(path.read_bytes().replace(b"reason", b"season", 1))
    with pytest.raises(ValueError, match=r"q\.parquet: damaged \(.*CRC"):
        read_quarantine(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"q\.parquet: damaged"):
        read_quarantine(path)


def test_reasons_are_one_line_of_bounded_length() -> None:
    row = CorruptItemError("a", "f", "got\n" + "1" * 5000).row
    assert row.reason.startswith("got 111")
    assert len(row.reason) <= 300
