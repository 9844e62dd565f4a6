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
from instseg.jobs import cluster as module
from instseg.jobs.cluster import JobError, cluster, usable_cpus
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


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_ray_gets_a_second_try(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_failures: int
) -> None:
    failures = [Exception("The current node timed out during startup.")] * num_failures

    def start() -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(module, "_start_local", start)
    if num_failures == 2:
        with pytest.raises(JobError, match="Ray did not start, twice: The current node timed out"), cluster():
            pass
    else:
        with cluster():
            pass
    assert capsys.readouterr().err.count("trying once more") == min(num_failures, 1)


@pytest.mark.parametrize(("quota", "expected"), [(1, 1), (0, 1), (10_000, len(os.sched_getaffinity(0)))])
def test_cpus_are_those_of_the_container_and_of_the_affinity(
    monkeypatch: pytest.MonkeyPatch, quota: int, expected: int
) -> None:
    """Ray reads the container's quota; half a CPU is none to it."""
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: quota)
    assert usable_cpus() == expected


def test_cpus_are_those_of_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


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
