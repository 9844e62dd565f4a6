"""Mistakes at the command line: one clear line, exit status 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "workflows" / "prepare.py"


def _run(devkit: Path, out: Path, *options: str) -> str:
    given = {"--devkit": str(devkit), "--split": "val", "--detections": str(devkit / "detections.json")}
    given |= {"--classes": str(devkit / "classes.txt"), "--logits": str(devkit / "logits"), "--out": str(out)}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    command = [sys.executable, str(SCRIPT), *(word for pair in given.items() for word in pair)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=out)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert list(out.iterdir()) == []
    return " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--devkit", "nowhere", "error: devkit nowhere: no such folder"),
        ("--split", "vall", "splits that exist: train, val"),
        ("--detections", "nothing.json", "error: detections nothing.json: no such file"),
        ("--out", __file__, "is a file"),
        ("--contact-sheet", __file__, "is a file; choose another --contact-sheet"),
        ("--classes", sys.executable, "expected text in UTF-8"),
        ("--max-quarantine", "1", "--max-quarantined"),
    ],
)
def test_mistakes_are_named(devkit: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    assert message in _run(devkit, tmp_path, option, value)
