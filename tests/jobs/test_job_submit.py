from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.head import REPOSITORY, TOKEN, Head, psutil, running_head

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


def submit(head: Head, *command: str, variables: dict[str, str] | None = None) -> str:
    environment = json.dumps({"env_vars": variables or {}})
    options = ["--address", head.dashboard, "--working-dir", ".", "--runtime-env-json", environment]
    done = subprocess.run(
        ["ray", "job", "submit", *options, "--", *command],
        cwd=REPOSITORY,
        env=head.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_head_listens_on_loopback_only(head: Head) -> None:
    with head.explained():
        addresses = {address.removeprefix("::ffff:") for process in head.processes() for address in listening(process)}
    assert addresses == {"127.0.0.1"}


def listening(process: Any) -> list[str]:
    with suppress(psutil.NoSuchProcess):  # Ray ends idle workers at any time
        return [socket.laddr.ip for socket in process.net_connections("inet") if socket.status == "LISTEN"]
    return []


def test_jobs_run_to_success_in_both_forms(head: Head, tiny_data: Path, tmp_path: Path) -> None:
    """A job knows the commit from its submitter alone: .git does not travel with the code."""
    ask = "from instseg.report.provenance import commit; print('commit:', commit())"
    options = [
        f"--data={tiny_data}",
        f"--out={tmp_path}/report",
        "--num-actors=1",
        "--num-gallery=0",
        "--tracking.uri=http://127.0.0.1:9",  # MLflow is not what this is about
    ]
    with head.explained():
        assert "commit: None" in submit(head, "python", "-c", ask)
        commit = {"INSTSEG_COMMIT": "0123abc-dirty"}
        output = submit(head, "workflows/evaluate.py", *options, variables=commit)
    assert "with 1 actors on CPUs; the cluster has 2 CPUs and 0 GPUs on 1 node" in output
    assert f"results: {tmp_path}/report/report.html" in output
    assert json.loads((tmp_path / "report" / "results.json").read_text())["commit"] == "0123abc-dirty"


def test_jobs_need_the_token(head: Head) -> None:
    with head.explained():
        assert head.jobs_status(TOKEN.read_text().strip()) == 200
        assert head.jobs_status("wrong") in (401, 403)
        assert head.jobs_status(None) in (401, 403)
