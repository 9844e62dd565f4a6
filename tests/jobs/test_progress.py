from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from instseg.jobs import progress as module
from instseg.jobs.progress import byte_progress, progress


def test_a_job_s_log_says_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six seconds an item: a line after every second of them."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in progress(range(30), 30, "evaluated images"):
        now[0] += 6
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert lines[:2] == ["evaluated images: 2 of 30", "evaluated images: 4 of 30, 0.17 a second, about 3 min left"]
    assert lines[-2:] == [
        "evaluated images: 28 of 30, 0.17 a second, about 12 s left",
        "evaluated images: 30 of 30, 0.17 a second, about 0 s left",
    ]


def test_what_was_there_already_is_no_measure_of_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ninety at once, then one a minute."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for index, _ in enumerate(progress(range(100), 100, "prepared shards")):
        now[0] += 60 * (index >= 90)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "prepared shards: 92 of 100, 0.02 a second, about 8 min left",
        "prepared shards: 93 of 100, 0.02 a second, about 7 min left",
    ]


def test_a_terminal_shows_how_far_and_how_long() -> None:
    """A real one, as rich asks the system what it is; a minute an item, of which the third is under way."""
    script = (
        "import rich.console\n"
        "now = [0.0]\n"
        "rich.console.monotonic = lambda: now[0]\n"
        "from instseg.jobs.progress import progress\n"
        "shown = progress(range(7), 7, 'prepared shards')\n"
        "for _ in range(3):\n"
        "    next(shown)\n"
        "    now[0] += 60\n"
        "shown.close()\n"
    )
    terminal, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", script], stdout=theirs, stderr=theirs, env=environment, check=True)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(theirs)
    os.close(terminal)
    assert re.search(r"prepared shards.*2/7.*0:05:00", shown), shown


@pytest.mark.parametrize(("total", "size", "left"), [(40_000_000, " of 40", ", about 78 s left"), (None, "", "")])
def test_bytes_count_from_those_that_were_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int | None, size: str, left: str
) -> None:
    """Ten megabytes were there, one comes every three seconds."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in byte_progress([bytes(1_000_000)] * 6, 10_000_000, total, "downloaded x.tar"):
        now[0] += 3
    assert capsys.readouterr().out == f"downloaded x.tar: 14{size} MB, 0.3 MB a second{left}\n"
