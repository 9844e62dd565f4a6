from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray

from instseg.models.checkpoint import find_checkpoint

pytestmark = pytest.mark.ray
psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    process: subprocess.Popen[bytes]
    dashboard: str
    environment: dict[str, str]

    def processes(self) -> list[Any]:
        return psutil.Process(self.process.pid).children(recursive=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of its own, started by the documented script, beside any other Ray on this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    port = free_port()
    options = ["--block", "--port=0", f"--dashboard-port={port}", "--num-cpus=2", "--object-store-memory=100000000"]
    options += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    # Not tmp_path: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, Path(folder, "head.log").open("wb") as log:
        process = subprocess.Popen(
            [REPOSITORY / "infra" / "start-head.sh", *options, f"--temp-dir={folder}"],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started = Head(process, f"http://127.0.0.1:{port}", environment)
        try:
            wait_for(port, process, Path(log.name))
            yield started
        finally:
            stop(started)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"the head did not start: {log.read_text()}")


def stop(head: Head) -> None:
    """End the head's own processes and no others: `ray stop` would end every Ray on the machine."""
    processes = head.processes() if head.process.poll() is None else []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.process.kill()
    head.process.wait(30)
    psutil.wait_procs(processes, timeout=30)


def submit(head: Head, *command: str) -> str:
    done = subprocess.run(
        ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *command],
        cwd=REPOSITORY,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_head_listens_on_loopback_only(head: Head) -> None:
    addresses = {address.removeprefix("::ffff:") for process in head.processes() for address in listening(process)}
    assert addresses == {"127.0.0.1"}


def listening(process: Any) -> list[str]:
    with suppress(psutil.NoSuchProcess):  # Ray ends idle workers at any time
        return [socket.laddr.ip for socket in process.net_connections("inet") if socket.status == "LISTEN"]
    return []


@pytest.mark.timeout(600)  # three process trees import torch one after the other
def test_jobs_run_to_success_in_both_forms(head: Head, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [
        f"--data={tiny_data}",
        f"--out={run}",
        "--num-epochs=1",
        "--num-workers=1",
        f"--tracking.uri=sqlite:///{tmp_path}/m.db",
    ]
    output = submit(head, "python", "workflows/train.py", *options)
    assert "epoch 1/1 done" in output
    assert find_checkpoint(run).state["epoch"] == 1
    assert "nothing to do" in submit(head, "workflows/train.py", *options)


def test_jobs_need_the_token(head: Head) -> None:
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/")
    assert refused.value.code in (401, 403)
    refused.value.close()
