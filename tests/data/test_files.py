from __future__ import annotations

from pathlib import Path

import pytest

from instseg.data.files import read_json, write_json


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
