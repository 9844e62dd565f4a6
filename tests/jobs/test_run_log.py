from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from instseg.jobs import run_log
from instseg.jobs.run_log import EpochLog, RunLog


@pytest.fixture
def lines() -> list[str]:
    return []


def test_a_line_every_ten_seconds_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """Four steps of four seconds by two workers in the second of three epochs of ten steps; 1 s of each was waiting."""
    now = [100.0]
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = EpochLog(cast(RunLog, SimpleNamespace(line_soon=lines.append)), 1, 3, num_steps=10, batch_size=2)
    for index in range(4):
        now[0] += 4
        log.add({"semantic_loss": float(index), "instance_loss": 1.0}, wait_ms=1000.0)
    expected = "epoch 2/3, step 3/10: semantic loss 1.0000, instance loss 1.0000, 0.50 images/s, data wait 25.0 %, "
    assert lines == [expected + "about 68 s left"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_lines_of_other_processes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    def say(log: RunLog) -> None:
        log.line_soon("first")
        log.line("second")

    with run_log.shown() as log:
        ray.get(cast(Any, ray.remote(say)).remote(log))
        log.line("third")
    assert capsys.readouterr().out.splitlines() == ["first", "second", "third"]
