"""Data sets laid out like the published ones, from a web server or a folder, become the folders that prepare reads."""

from __future__ import annotations

import hashlib
import io
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from instseg.config import DataSetName, FetchConfig
from instseg.data.published import DATA_SETS, DataSet
from instseg.data.voc import open_devkit
from instseg.jobs import download as download_module
from instseg.jobs import fetch as module
from instseg.jobs.fetch import fetch
from tests.jobs.ending import check_ending
from tests.jobs.file_server import FileServer, serve

VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
TREE = {
    VOC: [
        "VOCdevkit/VOC2012/JPEGImages/a.jpg", "VOCdevkit/VOC2012/JPEGImages/b.jpg",
        "VOCdevkit/VOC2012/SegmentationClass/a.png", "VOCdevkit/VOC2012/SegmentationObject/a.png",
        "VOCdevkit/VOC2012/Annotations/a.xml", "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt",
        "VOCdevkit/VOC2012/ImageSets/Main/train.txt",
    ],
    SBD: [f"benchmark_RELEASE/{path}" for path in (
        "README", "dataset/img/a.jpg", "dataset/cls/a.mat", "dataset/inst/a.mat", "dataset/train.txt",
        "dataset/val.txt",
    )],
    "train2017.zip": ["train2017/1.jpg", "train2017/2.jpg"],
    "val2017.zip": ["val2017/3.jpg"],
    "annotations_trainval2017.zip": [f"annotations/{kind}_{split}2017.json" for kind in ("captions", "instances")
                                     for split in ("train", "val")],
}  # fmt: skip
LAYOUT = {
    "voc": set(TREE[VOC][:-1]),
    "sbd": {f"sbd/{name}" for name in (
        "img/a.jpg", "cls/a.mat", "inst/a.mat", "train.txt", "val.txt", "train_noval.txt",
    )},
    "coco-train2017": {f"coco/{name}" for name in (
        "train2017/1.jpg", "train2017/2.jpg", "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
    )},
    "coco-val2017": {f"coco/{name}" for name in (
        "val2017/3.jpg", "annotations/instances_train2017.json", "annotations/instances_val2017.json",
    )},
}  # fmt: skip


def content_of(path: str) -> bytes:
    return b"a\n" if path.endswith(".txt") else random.Random(path).randbytes(2000)


def pack(name: str, paths: list[str]) -> bytes:
    buffer = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as zipped:
            for path in paths:
                zipped.writestr(path, content_of(path))
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if name.endswith(".tgz") else "w") as tarred:
        for path in paths:
            member = tarfile.TarInfo(path)
            member.size = len(content_of(path))
            tarred.addfile(member, io.BytesIO(content_of(path)))
    return buffer.getvalue()


ARCHIVES = {name: pack(name, paths) for name, paths in TREE.items()} | {"train_noval.txt": b"a\n"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_module, "MAX_WAIT_S", 0.0)
    with serve() as server:
        server.files |= ARCHIVES
        yield server


def published(url: str, archives: dict[str, bytes] = ARCHIVES) -> dict[DataSetName, DataSet]:
    """The data sets as they are published, but these archives at this place."""

    def small(data_set: DataSet) -> DataSet:
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in archives.items()}
        files = [
            replace(file, urls=(f"{url}/{file.name}",), checksum=f"sha256:{sums[file.name]}") for file in data_set.files
        ]
        return replace(data_set, files=tuple(files))

    return {name: small(data_set) for name, data_set in DATA_SETS.items() if name in LAYOUT}


def run(server: FileServer, out: Path, *names: DataSetName, **options: Any) -> None:
    fetch(FetchConfig(str(out), names, **options), published(server.url))


def tree(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def asked(server: FileServer) -> list[str]:
    return [request.path for request in server.requests]


def write_archives(folder: Path, **others: bytes) -> Path:
    folder.mkdir()
    for name, content in (ARCHIVES | others).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", LAYOUT)
def test_a_data_set_is_laid_out_as_prepare_reads_it(server: FileServer, tmp_path: Path, name: DataSetName) -> None:
    out = tmp_path / "data"
    run(server, out, name)
    assert tree(out) == LAYOUT[name]
    for path in LAYOUT[name]:
        inside = path.removeprefix("coco/").replace("sbd/", "benchmark_RELEASE/dataset/")
        assert (out / path).read_bytes() == content_of(inside)


def test_the_devkit_is_one(server: FileServer, tmp_path: Path) -> None:
    run(server, tmp_path, "voc")
    assert open_devkit(str(tmp_path / "VOCdevkit")) == open_devkit(str(tmp_path / "VOCdevkit/VOC2012"))


def test_what_data_sets_share_is_downloaded_once(server: FileServer, tmp_path: Path) -> None:
    run(server, tmp_path, "coco-train2017", "coco-val2017")
    assert tree(tmp_path) == LAYOUT["coco-train2017"] | LAYOUT["coco-val2017"]
    assert sorted(asked(server)) == ["annotations_trainval2017.zip", "train2017.zip", "val2017.zip"]


def test_the_next_command_is_printed(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(server, tmp_path, "coco-val2017")
    places, (following,) = check_ending(capsys.readouterr().out)
    assert places == [tmp_path]
    coco = tmp_path / "coco"
    expected = (str(coco / "annotations/instances_val2017.json"), str(coco / "val2017"), "fasterrcnn_resnet50_fpn")
    assert (following.coco, following.images, following.detector) == expected


def test_a_second_run_has_nothing_to_do(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(server, tmp_path, "voc", "sbd")
    server.requests.clear()
    assert "nothing to do" not in capsys.readouterr().out
    run(server, tmp_path, "voc", "sbd")
    assert server.requests == []
    assert f"nothing to do: voc, sbd are in {tmp_path}" in capsys.readouterr().out


def test_archives_are_kept_where_that_is_asked_for_and_used(server: FileServer, tmp_path: Path) -> None:
    run(server, tmp_path, "voc", keep_archives=True)
    assert tree(tmp_path) == LAYOUT["voc"] | {f"archives/{VOC}"}
    (tmp_path / "VOCdevkit").rename(tmp_path / "elsewhere")
    run(server, tmp_path, "voc", keep_archives=True)
    assert asked(server) == [VOC]
    assert tree(tmp_path) >= LAYOUT["voc"]


@pytest.mark.parametrize("option", ["archives", "mirrors"])
def test_local_archives_are_used_and_left_alone(server: FileServer, tmp_path: Path, option: str) -> None:
    folder = write_archives(tmp_path / "local archives")
    given = {"archives": str(folder)} if option == "archives" else {"mirrors": (folder.as_uri(),)}
    run(server, tmp_path / "data", "voc", "sbd", "coco-val2017", **given)
    assert tree(tmp_path / "data") == LAYOUT["voc"] | LAYOUT["sbd"] | LAYOUT["coco-val2017"]
    assert server.requests == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ARCHIVES


def test_what_a_folder_lacks_is_downloaded(server: FileServer, tmp_path: Path) -> None:
    folder = write_archives(tmp_path / "local")
    (folder / SBD).unlink()
    run(server, tmp_path / "data", "sbd", archives=str(folder))
    assert asked(server) == [SBD]


def test_a_local_archive_with_another_checksum_is_refused(server: FileServer, tmp_path: Path) -> None:
    folder = write_archives(tmp_path / "local", **{VOC: b"other"})
    with pytest.raises(ValueError, match=rf"local/{VOC}: expected sha256 \w+, got \w+: damaged, .*; replace or remove"):
        run(server, tmp_path / "data", "voc", archives=str(folder))
    assert (folder / VOC).read_bytes() == b"other"
    assert tree(tmp_path / "data") == set()


def test_mirrors_come_before_the_official_place(server: FileServer, tmp_path: Path) -> None:
    server.files = {f"mirror/{VOC}": ARCHIVES[VOC], SBD: ARCHIVES[SBD], "mirror/train_noval.txt": b"changed",
                    "train_noval.txt": b"a\n"}  # fmt: skip
    run(server, tmp_path, "voc", "sbd", mirrors=(f"{server.url}/mirror/",))
    assert tree(tmp_path) == LAYOUT["voc"] | LAYOUT["sbd"]
    assert asked(server) == [f"mirror/{VOC}", f"mirror/{SBD}", SBD, "mirror/train_noval.txt", "train_noval.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_extraction_is_never_taken_for_a_complete_one(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """After the first of two photographs."""

    def interrupted(*arguments: Any) -> Iterator[str]:
        yield next(extract(*arguments))
        assert len(list(tmp_path.rglob("*.jpg"))) == 1
        raise error

    extract = module.extract
    with monkeypatch.context() as patch:
        patch.setattr(module, "extract", interrupted)
        with pytest.raises(error):
            run(server, tmp_path, "voc")
    assert tree(tmp_path) == {f"archives/{VOC}"}  # not to be downloaded again
    run(server, tmp_path, "voc")
    assert tree(tmp_path) == LAYOUT["voc"]
    assert asked(server) == [VOC]


def test_what_a_killed_run_left_is_neither_used_nor_kept(server: FileServer, tmp_path: Path) -> None:
    left = tmp_path / f".unpacking-{VOC}" / "VOCdevkit/VOC2012/JPEGImages"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"half")
    run(server, tmp_path, "voc")
    assert tree(tmp_path) == LAYOUT["voc"]


def test_what_is_there_is_left_as_it_is(server: FileServer, tmp_path: Path) -> None:
    """As after a run that was killed when some folders were in their place."""
    run(server, tmp_path, "voc")
    own = tmp_path / "VOCdevkit/VOC2012/JPEGImages/a.jpg"
    own.write_bytes(b"own")
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation").rmdir()
    run(server, tmp_path, "voc")
    assert tree(tmp_path) == LAYOUT["voc"]
    assert own.read_bytes() == b"own"


def test_a_hostile_archive_writes_nothing(server: FileServer, tmp_path: Path) -> None:
    """Though its checksum is right."""
    hostile = ARCHIVES | {VOC: pack(VOC, [*TREE[VOC], "VOCdevkit/../../outside"])}
    server.files[VOC] = hostile[VOC]
    with pytest.raises(ValueError, match=r"unsafe, nothing was unpacked: .*outside' leads out of the folder"):
        fetch(FetchConfig(str(tmp_path / "data"), ("voc",)), published(server.url, hostile))
    assert tree(tmp_path) == {f"data/archives/{VOC}"}


def test_an_archive_that_lacks_something_is_refused(server: FileServer, tmp_path: Path) -> None:
    lacking = ARCHIVES | {VOC: pack(VOC, TREE[VOC][:2])}
    server.files[VOC] = lacking[VOC]
    with pytest.raises(ValueError, match=rf"{VOC}: expected VOCdevkit/VOC2012/SegmentationClass in it, which is not"):
        fetch(FetchConfig(str(tmp_path), ("voc",)), published(server.url, lacking))
    assert tree(tmp_path) == {f"archives/{VOC}"}


def test_room_for_what_is_unpacked_is_looked_for_first(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []
    monkeypatch.setattr(module, "check_space", lambda folder, num_bytes: needed.append((folder, num_bytes)))
    run(server, tmp_path, "coco-val2017")
    assert needed == [(tmp_path, 2000), (tmp_path, 4000)]  # without the captions


def test_the_published_table_is_complete() -> None:
    assert tuple(DATA_SETS) == get_args(DataSetName)
    files = {file for data_set in DATA_SETS.values() for file in data_set.files}
    assert len({file.name for file in files}) == len(files)
    lengths = {"md5": 32, "sha256": 64}
    for file in files:
        algorithm, _, checksum = file.checksum.partition(":")
        assert re.fullmatch(f"[0-9a-f]{{{lengths[algorithm]}}}", checksum)
        assert all(url.endswith(f"/{file.name}") and url.startswith("http") for url in file.urls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ()}, "datasets: expected at least one, got none"),
        ({"datasets": ("voc", "sbdd")}, "datasets: expected one of .*, got 'sbdd'; did you mean 'sbd'?"),
        ({"mirrors": ("ftp://host",)}, "mirrors: expected URLs that begin with .*, got ftp://host"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FetchConfig("out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"archives": "nowhere"}, "archives nowhere: expected a folder of this machine, there is none"),
        ({"mirrors": ("file:///no/where",)}, "mirrors file:///no/where: expected a folder of this machine"),
    ],
)
def test_folders_that_do_not_exist_are_named(server: FileServer, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        run(server, tmp_path / "data", "voc", **options)
    assert not (tmp_path / "data").exists()


def test_a_store_is_no_place_for_it() -> None:
    with pytest.raises(ValueError, match="out: expected a folder of this machine, got memory://data"):
        fetch(FetchConfig("memory://data"))


def test_neither_ray_nor_torch_is_needed() -> None:
    script = "import sys, instseg.jobs.fetch; print(*{'ray', 'mlflow', 'torch', 'pyarrow'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == ""
