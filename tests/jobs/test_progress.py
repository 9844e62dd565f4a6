from __future__ import annotations

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
    assert lines[0] == "evaluated images: 2 of 30, 0.17 a second, about 3 min left"
    assert lines[-1] == "evaluated images: 30 of 30, 0.17 a second, about 0 min left"


@pytest.mark.parametrize(("total", "size", "left"), [(40_000_000, " of 40", ", about 1 min left"), (None, "", "")])
def test_bytes_count_from_those_that_were_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int | None, size: str, left: str
) -> None:
    """Ten megabytes were there, one comes every three seconds."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in byte_progress([bytes(1_000_000)] * 6, 10_000_000, total, "downloaded x.tar"):
        now[0] += 3
    assert capsys.readouterr().out == f"downloaded x.tar: 14{size} MB, 0.3 MB a second{left}\n"
