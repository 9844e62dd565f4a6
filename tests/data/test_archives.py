"""Extraction: what is written is what was in the archive; what is hostile or damaged is refused before anything is."""

from __future__ import annotations

import io
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from instseg.data.archives import MAX_EXPANSION, extract, read_members

FILES = {"set/a.jpg": random.Random(0).randbytes(3000), "set/deep/b.txt": b"b", "other/empty": b""}
Kind = tuple[str, Callable[[Path, Iterable[tuple[str, bytes]]], None]]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))


def write_zip(path: Path, files: Iterable[tuple[str, bytes]], *members: zipfile.ZipInfo) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
        for member in members:
            archive.writestr(member, "target")


KINDS: list[Kind] = [("x.tar", write_tar), ("x.tgz", write_tar), ("x.zip", write_zip)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def unpack(archive: Path, folder: Path) -> dict[str, bytes]:
    sizes = read_members(archive)
    written = list(extract(archive, {name: folder / name for name in sizes}))
    assert sorted(written) == sorted(sizes)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_put_in_comes_out(tmp_path: Path, kind: Kind) -> None:
    kind[1](tmp_path / kind[0], FILES.items())
    assert read_members(tmp_path / kind[0]) == {name: len(content) for name, content in FILES.items()}
    assert unpack(tmp_path / kind[0], tmp_path / "out") == FILES


def test_only_what_is_asked_for_is_written_and_where(tmp_path: Path, kind: Kind) -> None:
    kind[1](tmp_path / kind[0], FILES.items())
    target = tmp_path / "out" / "renamed"
    assert list(extract(tmp_path / kind[0], {"set/deep/b.txt": target})) == ["set/deep/b.txt"]
    assert list((tmp_path / "out").rglob("*")) == [target]
    with pytest.raises(FileExistsError):
        list(extract(tmp_path / kind[0], {"set/deep/b.txt": target}))


def test_names_lose_what_means_nothing_and_folders_may_repeat(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./set")
    folder.type = tarfile.DIRTYPE
    write_tar(tmp_path / "x.tar", [("./set/a", b"1")], folder, folder)
    assert unpack(tmp_path / "x.tar", tmp_path / "out") == {"set/a": b"1"}


@pytest.mark.parametrize("name", ["/etc/x", "../x", "set/../../x", "set/..", "C:/x", "c:x", "set\\..\\x", "//host/x"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, kind: Kind, name: str) -> None:
    assert_refused(tmp_path, kind, [*FILES.items(), (name, b"x")], "leads out of the folder")


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Under two spellings of the same path."""
    write_tar(tmp_path / "x.tar", [("set/a", b"1"), ("set/./a", b"2")])
    with pytest.raises(ValueError, match="'set/a' is there twice"):
        read_members(tmp_path / "x.tar")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # of the module that writes it
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, kind: Kind) -> None:
    assert_refused(tmp_path, kind, [*FILES.items(), ("set/a.jpg", b"2")], "'set/a.jpg' is there twice")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    """One large file of zeros, and many that are too large together alone."""
    zeros = bytes(1 << 20)
    for name, write in KINDS[1:]:
        for files in ([("a", zeros)], [(f"a{k}", zeros[: 1 << 16]) for k in range(16)]):
            write(tmp_path / name, files)
            assert (tmp_path / name).stat().st_size * MAX_EXPANSION < len(zeros)
            with pytest.raises(ValueError, match=r"unsafe, nothing was unpacked: 'a\d*' unpacks to more than"):
                read_members(tmp_path / name)


@pytest.mark.parametrize(
    "type_", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("target", ["set/a.jpg", "/etc/passwd"])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, type_: bytes, target: str) -> None:
    member = tarfile.TarInfo("set/link")
    member.type, member.linkname = type_, target
    write_tar(tmp_path / "x.tar", FILES.items(), member)
    with pytest.raises(ValueError, match="'set/link' is a link or a device"):
        read_members(tmp_path / "x.tar")


@pytest.mark.parametrize("type_", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, type_: int) -> None:
    member = zipfile.ZipInfo("set/link")
    member.external_attr = (type_ | 0o777) << 16
    write_zip(tmp_path / "x.zip", FILES.items(), member)
    with pytest.raises(ValueError, match="'set/link' is a link or a device"):
        read_members(tmp_path / "x.zip")


def test_a_truncated_archive_is_damaged(tmp_path: Path, kind: Kind) -> None:
    """Cut in the middle of its largest file."""
    archive = tmp_path / kind[0]
    kind[1](archive, FILES.items())
    archive.write_bytes(archive.read_bytes()[:1500])
    with pytest.raises(ValueError, match=rf"{kind[0]}: damaged, or no archive that can be read \(.+\); replace it"):
        unpack(archive, tmp_path / "out")


def test_another_kind_of_file_is_damaged(tmp_path: Path, kind: Kind) -> None:
    (tmp_path / kind[0]).write_bytes(b"<html>" * 1000)
    with pytest.raises(ValueError, match="damaged, or no archive that can be read"):
        read_members(tmp_path / kind[0])


@pytest.mark.parametrize("size", [2999, 3001])
def test_a_zip_that_lies_about_a_size_is_damaged(tmp_path: Path, size: int) -> None:
    """Less is a checksum that does not fit; more would be a file that ends early."""
    archive = tmp_path / "x.zip"
    write_zip(archive, FILES.items())
    content = archive.read_bytes()
    where = content.index(b"PK\x01\x02") + 24  # the uncompressed size in the directory's first entry
    assert struct.unpack_from("<I", content, where) == (3000,)
    archive.write_bytes(content[:where] + struct.pack("<I", size) + content[where + 4 :])
    with pytest.raises(ValueError, match="damaged"):
        unpack(archive, tmp_path / "out")


def test_a_zip_with_a_password_is_not_asked_for_one(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    write_zip(archive, FILES.items())
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="password"):
        unpack(archive, tmp_path / "out")


def assert_refused(folder: Path, kind: Kind, files: list[tuple[str, bytes]], message: str) -> None:
    kind[1](folder / kind[0], files)
    with pytest.raises(ValueError, match=f"unsafe, nothing was unpacked: .*{message}"):
        unpack(folder / kind[0], folder / "out")
    assert list(folder.iterdir()) == [folder / kind[0]]
