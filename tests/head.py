"""A Ray head as `infra/start-head.sh` starts it, beside any other Ray on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
REPOSITORY = Path(__file__).resolve().parents[1]
TOKEN = Path.home() / ".ray" / "auth_token"  # start-head.sh makes it


@dataclass(frozen=True)
class Head:
    process: subprocess.Popen[bytes]
    folder: Path
    dashboard: str
    agent: str
    environment: dict[str, str]

    def processes(self) -> list[Any]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def jobs_status(self, token: str | None) -> int | None:
        """The HTTP status of the jobs API; None while nothing answers."""
        return status(f"{self.dashboard}/api/jobs/", token)

    def wait(self) -> None:
        """Until the jobs API answers and the agent that starts jobs sees its raylet; open ports are not enough."""
        deadline = time.monotonic() + 600
        while True:
            token = TOKEN.read_text().strip() if TOKEN.is_file() else None
            if self.jobs_status(token) == status(f"{self.agent}/api/local_raylet_healthz", token) == 200:
                return
            assert self.process.poll() is None, f"the head ended with status {self.process.poll()}"
            assert time.monotonic() < deadline, "the head does not answer"
            time.sleep(0.1)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Adds the end of the head's logs to whatever fails."""
        try:
            yield
        except BaseException as error:
            logs = [self.folder / "head.log", *sorted(self.folder.glob("session_2*/logs/dashboard*"))]
            for log in filter(Path.is_file, logs):
                error.add_note(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))
            raise

    def stop(self) -> None:
        """End the head's own processes and no others: `ray stop` would end every Ray on the machine."""
        processes = self.processes() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for process in {*processes, *self.survivors()}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes)
        assert not self.survivors()

    def survivors(self) -> list[Any]:
        """Processes that name the head's folder, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if str(self.folder) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def status(url: str, token: str | None) -> int | None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code
    except OSError:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_head() -> Iterator[Head]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    port, agent_port = free_port(), free_port()
    options = ["--block", "--port=0", f"--dashboard-port={port}", "--num-cpus=2", "--object-store-memory=100000000"]
    options += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={agent_port}"]
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
        servers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{agent_port}"
        head = Head(process, Path(folder), *servers, environment)
        try:
            with head.explained():
                head.wait()
            yield head
        finally:
            head.stop()
