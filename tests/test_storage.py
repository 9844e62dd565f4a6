"""Roots on disk, in an S3 server on loopback and in a file system of fsspec; all of them behave alike."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import FileSystem

from instseg import storage
from instseg.storage import StorageError, StoragePath
from tests.s3 import S3


@pytest.fixture(params=["folder", "file", "s3", "fsspec"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty root of each kind."""
    if request.param == "s3":
        return StoragePath.of(request.getfixturevalue("s3")("bucket")) / request.node.name
    places = {
        "folder": str(tmp_path / "root"),
        "file": (tmp_path / "root").as_uri(),
        "fsspec": f"memory://{tmp_path.name}",
    }
    return StoragePath.of(places[request.param])


def test_what_is_published_can_be_read_listed_and_deleted(root: StoragePath) -> None:
    assert root.files() == {}
    assert root.folders() == []
    (root / "b").publish(b"second")
    (root / "a").publish(b"first")
    (root / "a").publish(b"first again")
    (root / "folder" / "c").publish(b"")
    assert root.files() == {"a": 11, "b": 6}
    assert root.folders() == ["folder"]
    assert (root / "a").read_bytes() == b"first again"
    assert [(root / name).size() for name in ("a", "folder/c", "folder", "d")] == [11, 0, None, None]
    assert [(root / name).is_folder() for name in ("a", "folder", "d")] == [False, True, False]
    (root / "a").delete()
    (root / "d").delete()
    (root / "folder").delete_folder()
    (root / "d").delete_folder()
    assert root.files() == {"b": 6}
    assert root.folders() == []


def test_a_missing_file_is_named(root: StoragePath) -> None:
    for attempt in (StoragePath.read_bytes, lambda place: place.open().read()):
        with pytest.raises(FileNotFoundError) as raised:
            attempt(root / "absent")
        assert raised.value.filename in (str(root / "absent"), (root / "absent").key)
        assert not isinstance(raised.value, StorageError)


def test_a_file_is_read_at_random(root: StoragePath) -> None:
    (root / "numbers").publish(bytes(range(100)))
    with (root / "numbers").open() as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"abc"
        file.seek(10)
        assert file.read(2) == b"\n\x0b"
        assert file.tell() == 12


def test_a_file_larger_than_a_part_of_an_upload(root: StoragePath, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 20
    (tmp_path / "large").write_bytes(content)
    (root / "large").publish_file(tmp_path / "large")
    with (root / "large").on_disk() as path:
        assert path.read_bytes() == content
    assert root.local is None or path.exists()
    assert (root.local is None) != path.exists()


def test_a_file_written_bit_by_bit_appears_at_the_end_or_not_at_all(root: StoragePath) -> None:
    place = root / "list"
    with place.publishing() as file:
        file.writelines([b"one ", b"two"])
        assert place.size() is None
    with pytest.raises(ZeroDivisionError), place.publishing() as file:
        file.writelines(bytes(1 // divisor) for divisor in (1, 0))
    assert (root.files(), place.read_bytes()) == ({"list": 7}, b"one two")


def test_a_root_is_checked_without_a_trace(root: StoragePath) -> None:
    root.check_reachable()
    root.check_writable()
    assert root.files() == {}
    assert root.local is None or not root.local.exists()


@pytest.mark.parametrize(
    "text", ["s3://bucket/a/b?endpoint_override=h:1&scheme=http", "s3://bucket", "file:///a/b", "/a/b"]
)
def test_a_place_comes_back_as_it_was_typed(text: str) -> None:
    place = StoragePath.of(text)
    assert str(place) == text
    assert StoragePath.of(str(place)) == StoragePath.of(place) == pickle.loads(pickle.dumps(place))  # noqa: S301
    assert (place / "x").name == "x"
    assert (place / "x").parent == place


def test_a_relative_path_is_one_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert StoragePath.of("runs/x").local == tmp_path / "runs" / "x"
    assert StoragePath.of(Path("runs")) == StoragePath.of(f"{tmp_path}/runs/")


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="expected a URI without credentials") as raised:
        StoragePath.of("s3://someone:hunter2@bucket/prefix")
    assert "hunter2" not in str(raised.value)


def test_a_uri_needs_a_bucket_and_a_file_system() -> None:
    with pytest.raises(ValueError, match="expected s3://bucket/prefix, got a URI without a bucket"):
        StoragePath.of("s3:///prefix")
    with pytest.raises(ValueError, match="no file system for nothing://"):
        StoragePath.of("nothing://bucket/x").read_bytes()
    with pytest.raises(ValueError, match="Unexpected query parameter"):
        StoragePath.of("s3://bucket/x?endpoint=host").read_bytes()


def test_a_bucket_that_does_not_exist(s3: S3) -> None:
    place = StoragePath.of(s3("bucket").replace("s3://bucket", "s3://absent")) / "run"
    for attempt in (place.check_writable, place.check_reachable, lambda: place.publish(b"x")):
        with pytest.raises(StorageError, match="there is no bucket absent; create it, or mend the URI"):
            attempt()


def test_a_store_that_denies_access(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StoragePath.of(s3("bucket"))
    monkeypatch.setattr(s3, "hook", lambda *_: ("403 Forbidden", "AccessDenied"))
    for attempt in (place.check_writable, place.check_reachable, lambda: (place / "x").publish(b"x")):
        with pytest.raises(StorageError, match=r"access denied .*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            attempt()


@pytest.mark.usefixtures("quick")
def test_a_store_that_fills_up_leaves_what_was_published(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StoragePath.of(s3("bucket")) / "full"
    place.publish(b"before")
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    full = ("507 Insufficient Storage", "XMinioStorageFull")
    monkeypatch.setattr(s3, "hook", lambda asked, _: full if asked.startswith("PUT") else None)
    with pytest.raises(
        StorageError, match=r"cannot be reached .*; check the URI, the network and the store's free space"
    ):
        place.publish(b"after")
    monkeypatch.undo()
    assert place.read_bytes() == b"before"


def raising(*errors: OSError) -> Any:
    """Something to ask a store for that fails with each of these first."""
    left = list(errors)

    def work(*_: object) -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MAX_WAIT_S", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_store_that_falters_is_asked_again(s3: S3) -> None:
    place = StoragePath.of(s3("bucket"))
    slow = OSError("AWS Error SLOW_DOWN during PutObject operation")
    assert place._ask(raising(slow, slow)) == "done"
    with pytest.raises(StorageError, match=r"cannot be reached \(AWS Error SLOW_DOWN .*; check the URI, the network"):
        place._ask(raising(*[slow] * storage._ATTEMPTS))
    with pytest.raises(StorageError):  # a first contact is not patient
        place._ask(raising(slow), patient=False)


@pytest.mark.usefixtures("quick")
def test_what_a_store_will_never_do_is_asked_once(s3: S3) -> None:
    work = raising(OSError("AWS Error NO_SUCH_BUCKET"), OSError("asked again"))
    with pytest.raises(StorageError, match="there is no bucket"):
        StoragePath.of(s3("bucket"))._ask(work)


def test_nobody_at_the_endpoint() -> None:
    place = StoragePath.of("s3://bucket/run?endpoint_override=127.0.0.1:9&scheme=http")
    with pytest.raises(
        StorageError, match=r"s3://bucket/run\?endpoint_override=127.0.0.1:9.*cannot be reached .*onnect"
    ):
        place.check_writable()


def test_an_error_of_the_reader_is_not_the_store_s(root: StoragePath) -> None:
    def fail(place: StoragePath) -> None:
        with place.open() as file:
            raise OSError(file.read())

    (root / "x").publish(b"12")
    with pytest.raises(OSError, match="12") as raised:
        fail(root / "x")
    assert not isinstance(raised.value, StorageError)


@pytest.mark.parametrize("root", ["folder", "s3"], indirect=True)
def test_a_reader_never_sees_half_a_file(root: StoragePath) -> None:
    """Two contents of one byte each, megabytes long, in turn: what is read is always one of them."""
    place, contents, seen = root / "x", [bytes([value]) * 3_000_000 for value in (1, 2)], set()
    place.publish(contents[0])
    writing = threading.Event()

    def write() -> None:
        for turn in range(12):
            place.publish(contents[turn % 2])
        writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not writing.is_set():
        seen.add(place.read_bytes())
    writer.join()
    assert seen <= set(contents)
    assert root.files() == {"x": 3_000_000}


def test_a_full_disk_names_the_folder_and_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = StoragePath.of(tmp_path / "x")
    place.publish(b"before")

    monkeypatch.setattr(storage.uuid, "uuid4", lambda: SimpleNamespace(hex="1"))
    (tmp_path / "large").write_bytes(bytes(100_000))
    for publish in (lambda: place.publish(bytes(100_000)), lambda: place.publish_file(tmp_path / "large")):
        (tmp_path / "x.tmp-1").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as raised:
            publish()
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    (tmp_path / "large").unlink()
    assert place.read_bytes() == b"before"
    assert list(StoragePath.of(tmp_path).files()) == ["x"]


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write to"):
        (StoragePath.of(tmp_path) / "new" / "folder").check_writable()


def test_a_small_file_is_one_request(s3: S3) -> None:
    """Which is what makes it appear at once."""
    place = StoragePath.of(s3("bucket"))
    filesystem, _ = place.filesystem
    assert isinstance(filesystem, FileSystem)
    s3.requests.clear()
    (place / "one").publish(b"x")
    assert s3.requests == ["PUT /bucket/one"]
