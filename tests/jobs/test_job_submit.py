from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from instseg.models.checkpoint import find_checkpoint
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
    run = tmp_path / "run"
    options = [
        f"--data={tiny_data}",
        f"--out={run}",
        "--num-epochs=1",
        "--num-workers=1",
        f"--tracking.uri=sqlite:///{tmp_path}/m.db",
    ]
    with head.explained():
        output = submit(head, "python", "workflows/train.py", *options)
        assert "epoch 1/1 done" in output
        assert find_checkpoint(run).state["epoch"] == 1
        assert "nothing to do" in submit(head, "workflows/train.py", *options)


def test_a_job_knows_the_commit_only_from_its_submitter(head: Head) -> None:
    command = ["python", "-c", "from instseg.report.provenance import commit; print('commit:', commit())"]
    with head.explained():
        assert "commit: None" in submit(head, *command)
        assert "commit: 0123abc-dirty" in submit(head, *command, variables={"INSTSEG_COMMIT": "0123abc-dirty"})


def test_jobs_need_the_token(head: Head) -> None:
    with head.explained():
        assert head.jobs_status(TOKEN.read_text().strip()) == 200
        assert head.jobs_status("wrong") in (401, 403)
        assert head.jobs_status(None) in (401, 403)
