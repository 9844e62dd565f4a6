"""Published data sets become folders that prepare reads: download, checksum, safe extraction."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from instseg.config import DataSetName, FetchConfig
from instseg.data.archives import extract, read_members
from instseg.data.published import DATA_SETS, DataSet, PublishedFile
from instseg.jobs.download import check_space, download, verify
from instseg.jobs.ending import command, end
from instseg.jobs.progress import progress
from instseg.jobs.roots import check_out
from instseg.storage import StoragePath

DETECTOR = "fasterrcnn_resnet50_fpn"  # of the command that comes next
ARCHIVES = "archives"  # where downloads go, in the folder of all data sets


def fetch(config: FetchConfig, data_sets: Mapping[DataSetName, DataSet] = DATA_SETS) -> None:
    """Put the data sets into the folder `config.out`; what is there already is left as it is.

    Raises:
        FileNotFoundError: If `archives` or the folder of a file:// mirror does not exist.
        ValueError: If `out` is no folder of this machine; if an archive of this machine has another checksum than
            the published one; if an archive is unsafe or lacks something.
        OSError: If a file cannot be downloaded, or the disk is full.
    """
    out = StoragePath.of(config.out).local
    if out is None:
        raise ValueError(f"out: expected a folder of this machine, got {config.out}")
    check_out(config.out)
    folders = [*_local_folders(config), out / ARCHIVES]
    files = dict.fromkeys(file for name in config.datasets for file in data_sets[name].files)
    missing = {file: contents for file in files if (contents := _missing(file, out))}
    out.mkdir(parents=True, exist_ok=True)
    for file, contents in missing.items():
        archive = _obtain(file, folders, config.mirrors)
        _unpack(archive, contents, out)
        if not config.keep_archives and archive.parent == out / ARCHIVES:
            archive.unlink()
    if not missing:
        print(f"nothing to do: {', '.join(config.datasets)} are in {out}", flush=True)
    end(out, following=[_prepare(data_sets[name], config.out) for name in config.datasets])


def _prepare(data_set: DataSet, out: str) -> str:
    options = shlex.split(data_set.options.format(out=shlex.quote(out)))
    return command("prepare", *options, detector=DETECTOR, out="FOLDER")


def _local_folders(config: FetchConfig) -> list[Path]:
    """The folders of this machine where archives may be."""
    named = {"archives": [config.archives] if config.archives else []}
    named["mirrors"] = [mirror for mirror in config.mirrors if mirror.startswith("file://")]
    folders = []
    for option, places in named.items():
        for place in places:
            folder = StoragePath.of(place).local
            if folder is None or not folder.is_dir():
                raise FileNotFoundError(f"{option} {place}: expected a folder of this machine, there is none")
            folders.append(folder)
    return folders


def _missing(file: PublishedFile, out: Path) -> list[tuple[str, str]]:
    return [(inside, place) for inside, place in file.contents if not (out / place).exists()]


def _obtain(file: PublishedFile, folders: list[Path], mirrors: tuple[str, ...]) -> Path:
    """A published file from the first of the folders that has it, or downloaded into the last."""
    for folder in folders:
        archive = folder / file.name
        if archive.is_file():
            try:
                verify(archive, file.checksum)
            except ValueError as error:
                raise ValueError(f"{error}; replace or remove it, and it is downloaded") from None
            return archive
    base = [mirror.rstrip("/") for mirror in mirrors if not mirror.startswith("file://")]
    archive = folders[-1] / file.name
    download([*(f"{mirror}/{file.name}" for mirror in base), *file.urls], archive, file.checksum)
    return archive


def _unpack(archive: Path, contents: list[tuple[str, str]], out: Path) -> None:
    """Extract next to where it belongs and rename at the end, so that what is in its place is complete."""
    staging = out / f".unpacking-{archive.name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        if contents[0][0]:
            _extract(archive, contents, staging)
        else:
            (staging / contents[0][1]).parent.mkdir(parents=True)
            shutil.copyfile(archive, staging / contents[0][1])
        for _, place in contents:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            (staging / place).rename(out / place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(archive: Path, contents: list[tuple[str, str]], staging: Path) -> None:
    sizes = read_members(archive)
    targets: dict[str, Path] = {}
    for inside, place in contents:
        names = [name for name in sizes if name == inside or name.startswith(f"{inside}/")]
        if not names:
            raise ValueError(f"{archive}: expected {inside} in it, which is not there; replace it")
        targets.update({name: staging / (place + name.removeprefix(inside)) for name in names})
    check_space(staging.parent, sum(sizes[name] for name in targets))
    for _ in progress(extract(archive, targets), len(targets), f"unpacked files of {archive.name}"):
        pass
