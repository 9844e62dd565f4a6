"""Downloads from a web server that fails: what is there is not sent again, nothing is spliced or taken unchecked."""

from __future__ import annotations

import errno
import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from instseg.jobs import download as module
from instseg.jobs.download import download
from tests.jobs.file_server import FileServer, Request, serve

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
CUT = 100_000
WHOLE = Request("x.tar", None, None)


def sum_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "MAX_WAIT_S", 0.0)
    with serve() as server:
        server.files["x.tar"] = CONTENT
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "archives" / "x.tar"


def get(server: FileServer, target: Path, content: bytes = CONTENT) -> None:
    """Download what has to be `content`, and leave nothing else."""
    download([f"{server.url}/x.tar"], target, sum_of(content))
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def leave_part(server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run that gives up after its connection was cut."""
    server.cuts = [CUT]
    with monkeypatch.context() as patch:
        patch.setattr(module, "ATTEMPTS", 1)
        with pytest.raises(
            OSError, match=r"x\.tar: cannot be downloaded: .* cut after 100000 of 300000 bytes; run the"
        ):
            get(server, target)
    assert not target.exists()
    server.requests.clear()
    server.statuses.clear()


def test_a_file_is_downloaded_whole(server: FileServer, target: Path) -> None:
    get(server, target)
    assert server.requests == [WHOLE]


@pytest.mark.parametrize("headers", [{"ETag": '"one"'}, {"Last-Modified": "Mon, 18 Nov 2013 12:00:00 GMT"}])
def test_after_a_cut_the_missing_range_alone_is_sent(
    server: FileServer, target: Path, headers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    server.validators, server.cuts = headers, [CUT, 50_000]
    get(server, target)
    (validator,) = headers.values()
    assert server.requests == [
        WHOLE,
        Request("x.tar", "bytes=100000-", validator),
        Request("x.tar", "bytes=150000-", validator),
    ]
    assert server.statuses == [200, 206, 206]
    assert "cut after 100000 of 300000 bytes; trying again" in capsys.readouterr().err


def test_another_run_sends_the_missing_range_alone(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_part(server, target, monkeypatch)
    get(server, target)
    assert server.requests == [Request("x.tar", "bytes=100000-", '"one"')]


def test_a_server_without_ranges_sends_all_again(server: FileServer, target: Path) -> None:
    server.ranges, server.cuts = False, [CUT]
    get(server, target)
    assert server.statuses == [200, 200]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"one"'}])
def test_a_file_that_cannot_be_told_from_another_version_is_sent_again(
    server: FileServer, target: Path, headers: dict[str, str]
) -> None:
    server.validators, server.cuts = headers, [CUT]
    get(server, target)
    assert server.requests == [WHOLE, WHOLE]


def test_a_file_that_changed_is_not_spliced(server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_part(server, target, monkeypatch)
    server.files["x.tar"], server.validators = OTHER, {"ETag": '"two"'}
    get(server, target, OTHER)
    assert server.statuses == [200]


def test_a_server_that_sends_another_range_is_asked_for_the_whole(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_part(server, target, monkeypatch)
    answer = server.answer

    def skip(request: Request) -> tuple[int, dict[str, str], bytes]:
        status, headers, body = answer(request)
        return (206, {"Content-Range": "bytes 150000-299999/300000"}, body[50_000:]) if request.range else (
            status, headers, body)  # fmt: skip

    monkeypatch.setattr(server, "answer", skip)
    get(server, target)
    assert server.statuses == [206, 200]


def test_what_was_complete_when_a_run_was_killed_is_not_sent_again(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_part(server, target, monkeypatch)
    (target.parent / "x.tar.part").write_bytes(CONTENT)
    get(server, target)
    assert server.statuses == [416]


def test_a_wrong_checksum_is_refused_and_what_came_is_deleted(server: FileServer, target: Path) -> None:
    with pytest.raises(OSError, match="cannot be downloaded") as raised:
        download([f"{server.url}/x.tar"], target, sum_of(OTHER))
    expected, got = (hashlib.sha256(content).hexdigest() for content in (OTHER, CONTENT))
    assert f"expected sha256 {expected}, got {got}" in str(raised.value)
    assert "--mirrors" in str(raised.value)
    assert list(target.parent.iterdir()) == []
    assert server.requests == [WHOLE]


def test_mirrors_take_their_turns(server: FileServer, target: Path) -> None:
    """One that cannot be reached, one without the file, one with another, one that always fails, one that has it."""
    server.files = {"changed/x.tar": OTHER, "good/x.tar": CONTENT, "never/x.tar": CONTENT}
    urls = [f"{server.url}/{name}/x.tar" for name in ("missing", "changed", "good", "never")]
    download(["http://127.0.0.1:1/x.tar", *urls], target, sum_of(CONTENT))
    assert target.read_bytes() == CONTENT
    assert [request.path for request in server.requests] == ["missing/x.tar", "changed/x.tar", "good/x.tar"]


def test_what_no_mirror_has_is_told_with_all_reasons(server: FileServer, target: Path) -> None:
    server.files = {"changed/x.tar": OTHER}
    with pytest.raises(OSError, match="cannot be downloaded") as raised:
        download([f"{server.url}/{name}/x.tar" for name in ("missing", "changed")], target, sum_of(CONTENT))
    assert f"{server.url}/missing/x.tar: HTTP Error 404" in str(raised.value)
    assert f"{server.url}/changed/x.tar: " in str(raised.value)


def test_a_busy_server_is_asked_again_and_not_for_ever(server: FileServer, target: Path) -> None:
    server.failures = [503, 429, 500]
    get(server, target)
    assert server.statuses == [503, 429, 500, 200]
    target.unlink()
    server.failures = [503] * 50
    with pytest.raises(OSError, match="HTTP Error 503"):
        get(server, target)
    assert len(server.failures) == 50 - module.ATTEMPTS


def test_a_disk_without_room_is_seen_before_anything_is_written(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=200_000))
    with pytest.raises(OSError, match=r"expected 0\.30 MB of free space, got 0\.20 MB; make room"):
        get(server, target)
    assert (target.parent / "x.tar.part").stat().st_size == 0
    assert len(server.requests) == 1


def test_what_is_there_needs_no_more_room(server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_part(server, target, monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=200_000))
    get(server, target)


def test_a_full_disk_is_no_fault_of_the_network(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(chunks: object, *arguments: object) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "byte_progress", fill)
    with pytest.raises(OSError, match="No space left") as raised:
        download([f"{server.url}/x.tar", f"{server.url}/x.tar"], target, sum_of(CONTENT))
    assert raised.value.errno == errno.ENOSPC
    assert len(server.requests) == 1
