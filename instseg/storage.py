"""Roots and the files under them: a folder, or a prefix of an object store. The only module that knows file systems.

A file appears whole or not at all: on disk under a temporary name that is renamed, in an object store by one upload.
Disks need no package; URIs need pyarrow.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias, TypeVar, cast
from urllib.parse import unquote, urlsplit

_ATTEMPTS = 6  # at what a store refuses for now, and the seconds between them at most
_MAX_WAIT_S = 16.0
_FINAL = ("NO_SUCH_BUCKET", "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")  # S3's words
Result = TypeVar("Result")
Place: TypeAlias = "str | os.PathLike[str] | StoragePath"


class StorageError(OSError):
    """An object store that cannot be reached, or refuses what is asked of it; no fault of the file at hand."""


@dataclass(frozen=True, order=True)
class StoragePath:
    """A place on disk or in an object store, whether there is something or not; `StoragePath.of` reads it.

    Attributes:
        scheme: "" for a path of this machine; "file" for one that is the same on all of them; else that of the URI.
        store: Of a URI, what comes before the key: a bucket, a host.
        key: The absolute path, or the key in the store.
        query: Of the URI: options of pyarrow's file system, as in "endpoint_override=host:9000&scheme=http".
    """

    scheme: str
    store: str
    key: str
    query: str = ""

    @staticmethod
    def of(place: Place) -> StoragePath:
        """Read what a person typed: a path, relative ones from the current directory, or a URI.

        Raises:
            ValueError: If it is a URI without a bucket or host, or with a password.
        """
        if isinstance(place, StoragePath):
            return place
        text = os.fspath(place)
        if "://" not in text:
            return StoragePath("", "", os.path.abspath(text))
        parts = urlsplit(text)
        if "@" in parts.netloc:
            shown = f"{parts.scheme}://…@{parts.netloc.split('@')[-1]}{parts.path}"
            raise ValueError(
                f"{shown}: expected a URI without credentials, which would be recorded with the run; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        if parts.scheme == "file":
            return StoragePath("file", "", os.path.abspath(unquote(parts.path)))
        if not parts.netloc:
            raise ValueError(f"{text}: expected {parts.scheme}://bucket/prefix, got a URI without a bucket")
        return StoragePath(parts.scheme, parts.netloc, parts.path.strip("/"), parts.query)

    def __str__(self) -> str:
        if not self.scheme:
            return self.key
        separator = "" if self.scheme == "file" or not self.key else "/"
        return f"{self.scheme}://{self.store}{separator}{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str) -> StoragePath:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part of the key; the bucket's name where there is no key."""
        return PurePosixPath(self.key).name or self.store

    @property
    def parent(self) -> StoragePath:
        """The folder that it lies in."""
        return replace(self, key="" if "/" not in self.key else str(PurePosixPath(self.key).parent))

    @property
    def local(self) -> Path | None:
        """The path on disk, None in an object store."""
        return Path(self.key) if self.scheme in ("", "file") else None

    @property
    def filesystem(self) -> tuple[Any, str]:
        """A pyarrow file system, and what this place is called in it."""
        if self.local is not None:
            from pyarrow.fs import LocalFileSystem

            return LocalFileSystem(), self.key
        filesystem, base = _open_store(self.scheme, self.store, self.query)
        return filesystem, f"{base}/{self.key}" if self.key else base

    def size(self) -> int | None:
        """Bytes of the file; None if there is none."""
        if self.local is not None:
            return self.local.stat().st_size if self.local.is_file() else None
        info = self._ask(lambda filesystem, path: filesystem.get_file_info(path))
        return info.size if info.is_file else None

    def is_folder(self) -> bool:
        """Whether it is a folder, or the beginning of some key."""
        if self.local is not None:
            return self.local.is_dir()
        return (
            not self.key or self._ask(lambda filesystem, path: filesystem.get_file_info(path)).type.name == "Directory"
        )

    def files(self) -> dict[str, int]:
        """Sizes of the files directly in this folder, by name, sorted; none if there is no such folder."""
        if self.local is not None:
            found = [path for path in self.local.iterdir() if path.is_file()] if self.local.is_dir() else []
            return {path.name: path.stat().st_size for path in sorted(found)}
        return {info.base_name: info.size for info in self._listing() if info.is_file}

    def folders(self) -> list[str]:
        """Names of the folders directly in this folder, sorted; none if there is no such folder."""
        if self.local is not None:
            return sorted(path.name for path in self.local.iterdir() if path.is_dir()) if self.local.is_dir() else []
        return [info.base_name for info in self._listing() if not info.is_file]

    def _listing(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        found = self._ask(lambda filesystem, path: filesystem.get_file_info(FileSelector(path, allow_not_found=True)))
        return sorted(found, key=lambda info: info.base_name)

    def open(self) -> IO[bytes]:
        """The file, open for reading at random; a context manager. In a store, each read is patient.

        Raises:
            FileNotFoundError: If there is no such file.
            StorageError: If the store cannot be reached, here and at each read.
        """
        return self.local.open("rb") if self.local is not None else cast(IO[bytes], _StoreFile(self))

    def read_bytes(self) -> bytes:
        """All of the file. Raises as `open`."""
        if self.local is not None:
            return self.local.read_bytes()
        with self.open() as file:
            return file.read(file.seek(0, io.SEEK_END) + file.seek(0))  # one request, or it would mix two versions

    def publish(self, content: bytes) -> None:
        """Write the file, in the place of one of that name; readers find all of it or nothing.

        Raises:
            StorageError: If the store cannot be reached.
            OSError: If the disk cannot be written, such as when it is full; names the folder.
        """
        if self.local is None:
            self._ask(lambda filesystem, path: _upload(filesystem, path, io.BytesIO(content)))
            return
        with _renamed(self.local) as temporary:
            temporary.write_bytes(content)

    def publish_file(self, source: Path) -> None:
        """As `publish`, with the content of a file on disk, which may be larger than memory."""
        if self.local is None:

            def upload(filesystem: Any, path: str) -> None:
                with source.open("rb") as file:
                    _upload(filesystem, path, file)

            self._ask(upload)
            return
        with _renamed(self.local) as temporary:
            shutil.copyfile(source, temporary)

    @contextmanager
    def publishing(self) -> Iterator[IO[bytes]]:
        """As `publish`, with what is written into the given file within the context, which may exceed the memory."""
        if self.local is not None:
            with _renamed(self.local) as temporary, temporary.open("wb") as file:
                yield file
            return
        with tempfile.TemporaryDirectory() as folder:
            with (Path(folder) / self.name).open("wb") as file:
                yield file
            self.publish_file(Path(folder) / self.name)

    def delete(self) -> None:
        """Delete the file, if there is one."""
        if self.local is not None:
            self.local.unlink(missing_ok=True)
        elif self.size() is not None:
            self._ask(lambda filesystem, path: filesystem.delete_file(path))

    def delete_folder(self) -> None:
        """Delete all that is in this folder, and it, if there is one."""
        if self.local is not None:
            shutil.rmtree(self.local, ignore_errors=True)
        elif self.is_folder():
            self._ask(lambda filesystem, path: filesystem.delete_dir(path))

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The file on this machine's disk: itself, or a copy for the time of the context. Raises as `open`."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / self.name
            with self.open() as file, copy.open("wb") as target:
                _copy(file, target)
            yield copy

    def check_reachable(self) -> None:
        """Raise StorageError unless the store answers and lets this place be listed; at once, for a first contact."""
        if self.local is None:
            from pyarrow.fs import FileSelector

            with suppress(FileNotFoundError):
                self._ask(lambda filesystem, path: filesystem.get_file_info(FileSelector(path)), patient=False)

    def check_writable(self) -> None:
        """Raise OSError unless files can be written here, as a first contact; in a store one is."""
        if self.local is not None:
            nearest = nearest_existing(self.local)
            if not os.access(nearest, os.W_OK):
                raise PermissionError(f"{self}: cannot be written: no permission to write to {nearest}")
            return
        name = f".probe-{uuid.uuid4().hex}"
        self._ask(lambda filesystem, path: _upload(filesystem, f"{path}/{name}", io.BytesIO()), patient=False)
        (self / name).delete()

    def _ask(self, work: Callable[[Any, str], Result], patient: bool = True) -> Result:
        """Do something in an object store, again where it may help; its errors in words that say what to do."""
        from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        patiently = retry(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(_ATTEMPTS if patient else 1),
            wait=wait_exponential_jitter(initial=1.0, max=_MAX_WAIT_S),
            reraise=True,
        )
        try:
            return patiently(work)(*self.filesystem)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self)) from None
        except OSError as error:
            raise StorageError(self._explain(" ".join(str(error).split()))) from error

    def _explain(self, reason: str) -> str:
        if "NO_SUCH_BUCKET" in reason:
            return f"{self}: there is no bucket {self.store}; create it, or mend the URI"
        if any(word in reason for word in _FINAL):
            return (
                f"{self}: access denied ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, or "
                "give the nodes a role, that may read and write it"
            )
        return f"{self}: cannot be reached ({reason}); check the URI, the network and the store's free space"


def nearest_existing(path: Path) -> Path:
    """An absolute path itself if it exists, else the nearest thing above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())


class _StoreFile(io.RawIOBase):
    """A file in an object store."""

    def __init__(self, place: StoragePath) -> None:
        self._place = place
        self._file = place._ask(lambda filesystem, path: filesystem.open_input_file(path))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        position = self._file.tell()

        def fill(*_: object) -> int:
            self._file.seek(position)
            return self._file.readinto(buffer)

        return self._place._ask(fill)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@functools.cache
def _open_store(scheme: str, store: str, query: str) -> tuple[Any, str]:
    """The file system of an object store, and what its root is called there: pyarrow's, else fsspec's."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    # Without this, pyarrow sends three requests for a small file instead of one.
    options = "&".join(filter(None, [query, "allow_delayed_open=true" if scheme == "s3" else ""]))
    try:
        return FileSystem.from_uri(f"{scheme}://{store}" + (f"?{options}" if options else ""))
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise ValueError(f"{scheme}://{store}?{query}: {error}") from None
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(f"{scheme}://{store}")
    except (ValueError, ImportError) as error:
        raise ValueError(f"{scheme}://{store}: no file system for {scheme}:// ({error})") from None
    return PyFileSystem(FSSpecHandler(filesystem)), path.rstrip("/")


def _upload(filesystem: Any, path: str, source: IO[bytes]) -> None:
    if filesystem.type_name not in ("s3", "gcs", "abfs"):  # which have no folders
        filesystem.create_dir(path.rpartition("/")[0])
    with filesystem.open_output_stream(path) as target:
        _copy(source, target)


def _copy(source: IO[bytes], target: Any) -> None:
    shutil.copyfileobj(source, target, 1 << 24)


def _may_pass(error: BaseException) -> bool:
    """Whether the same may succeed later."""
    final = isinstance(error, FileNotFoundError) or any(word in str(error) for word in _FINAL)
    return isinstance(error, OSError) and not final


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` at the end."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, reason, str(path.parent)) from None
    finally:
        temporary.unlink(missing_ok=True)
