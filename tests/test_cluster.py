from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import ray

from instseg.cluster import cluster
from instseg.config import TrackingConfig
from instseg.tracking import Tracker

pytestmark = pytest.mark.usefixtures("running")


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


def test_a_terminated_run_ends_as_killed(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    tracking = TrackingConfig(uri="http://127.0.0.1:9")  # what the run logged is then in its spool
    with (
        pytest.raises(SystemExit),
        Tracker.start(tracking, "stopped", {}, {}, tmp_path / "spool"),
        cluster(),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert '"status": "KILLED"' in (tmp_path / "spool").read_text().splitlines()[-1]
    assert signal.getsignal(signal.SIGTERM) == (before or signal.SIG_DFL)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    entered = []

    def enter() -> None:
        with cluster():
            entered.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [before]
