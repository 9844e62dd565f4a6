"""What is in a tar or zip file, and its extraction, which trusts neither names nor types nor sizes in it."""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

MAX_EXPANSION = 20  # JPEG, PNG, .mat and JSON do not shrink that much; what does was made to fill the disk
# The last is what zipfile raises where a password or an unknown compression is needed.
_UNREADABLE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)


class _Member(NamedTuple):
    name: str  # without "./" and "//"
    size: int  # bytes, as the archive says
    is_file: bool
    is_folder: bool
    open: Callable[[], IO[bytes] | None]


def read_members(archive: Path) -> dict[str, int]:
    """Sizes in bytes of the files in an archive, by name, after a look at every member of it.

    Raises:
        FileNotFoundError: If there is no archive.
        ValueError: If it is damaged, has a member that is neither a file nor a folder or whose name leads elsewhere,
            has a file twice, or says that it unpacks to more than `MAX_EXPANSION` times its size.
    """
    sizes: dict[str, int] = {}
    left = MAX_EXPANSION * archive.stat().st_size
    with _blamed(archive):
        for member in _members(archive):
            left -= member.size
            problem = _problem(member, sizes, left)
            if problem:
                raise ValueError(
                    f"{archive}: unsafe, nothing was unpacked: {member.name!r} {problem}; expected files and folders "
                    "alone, each file once, under relative names; get the archive from where it was published"
                )
            if member.is_file:
                sizes[member.name] = member.size
    return sizes


def extract(archive: Path, targets: Mapping[str, Path]) -> Iterator[str]:
    """Write files of an archive that `read_members` has looked at to new files, and yield the name of each.

    Raises:
        FileExistsError: If there is such a file.
        ValueError: If the archive is damaged.
    """
    with _blamed(archive):
        for member in _members(archive):
            if member.is_file and member.name in targets:
                _write(member, targets[member.name])
                yield member.name


def _write(member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = member.open()
    assert source is not None  # as of every file
    with source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        if file.tell() != member.size:
            raise EOFError(f"{member.name} has {file.tell()} bytes instead of {member.size}")


def _members(archive: Path) -> Iterator[_Member]:
    """In the order of the archive; those of a tar one by one, so that a bomb is seen before it is read to its end."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                # 0 is what systems without types of files write
                is_plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                is_folder = info.filename.endswith("/")
                kind = (is_plain and not is_folder, is_plain and is_folder)
                yield _Member(_normal(info.filename), info.file_size, *kind, partial(opened.open, info))
    else:
        with tarfile.open(archive, "r:" if archive.suffix == ".tar" else "r:gz") as opened:
            for info in opened:
                kind = (info.isreg(), info.isdir())
                yield _Member(_normal(info.name), info.size, *kind, partial(opened.extractfile, info))


def _normal(name: str) -> str:
    return str(PurePosixPath(name))


def _problem(member: _Member, seen: Mapping[str, int], left: int) -> str:
    """What is wrong with a member, or nothing."""
    name = member.name
    if name.startswith("/") or "\\" in name or re.match("[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
        return "leads out of the folder"
    if not member.is_file and not member.is_folder:
        return "is a link or a device"
    if left < 0:
        return "unpacks to more than the data sets, which are compressed already, can"
    return "is there twice" if name in seen else ""


@contextmanager
def _blamed(archive: Path) -> Iterator[None]:
    """Raise ValueError that names the archive where reading it fails."""
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{archive}: damaged, or no archive that can be read ({error}); replace it") from error
