from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray

from instseg.config import TrackingConfig
from instseg.jobs.cluster import cluster
from instseg.jobs.tracking import Tracker


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


@pytest.mark.usefixtures("running")
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


@pytest.mark.usefixtures("running")
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


def test_a_local_cluster_listens_on_loopback_only() -> None:
    """In a process of its own: Ray is imported first, and configured by `cluster` all the same."""
    script = (
        "import ray, psutil\n"
        "from instseg.jobs.cluster import cluster\n"
        "with cluster():\n"
        "    assert ray.get(ray.remote(lambda: 1).remote()) == 1\n"
        "    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "    sockets = [s for process in ours for s in process.net_connections('inet') if s.status == 'LISTEN']\n"
        "    print(*{s.laddr.ip.removeprefix('::ffff:') for s in sockets})\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["127.0.0.1"]
