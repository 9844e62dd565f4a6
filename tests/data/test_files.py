from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instseg.data.files import published, read_json, write_json


def test_readers_find_all_of_a_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with suppress(KeyError), published(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with published(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "whole"


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    table = pa.table({"a": [os.urandom(100_000)]})
    for write in (lambda file: file.write_bytes(bytes(100_000)), lambda file: pq.write_table(table, file)):
        (tmp_path / f"a.tmp-{os.getpid()}").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught, published(tmp_path / "a") as temporary:
            write(temporary)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_json_that_was_changed_is_damaged(tmp_path: Path) -> None:
    path, record = tmp_path / "a.json", {"name": "cat", "values": [1, 2.5, None, True]}
    write_json(path, record)
    assert read_json(path) == record
    text = path.read_text()
    for changed in (text.replace("cat", "bat"), text.replace("2.5", "3.5"), text[:-4], "", "[]", "[" * 100_000, "{}"):
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"a\.json: damaged"):
            read_json(path)
    path.write_text(text.replace("\n", " "))
    assert read_json(path) == record
