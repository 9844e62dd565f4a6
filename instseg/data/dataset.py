"""Random access to a data directory that workflows/prepare.py wrote."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from instseg.data.files import digest, read_json, sha256_of
from instseg.data.schema import FORMAT_VERSION, decode_row
from instseg.storage import Place, StorageError, StoragePath
from instseg.structures import Sample

MANIFEST = "manifest.json"
_NUM_READERS = 2  # threads; decoding holds the interpreter, so more would only share it
_ADVICE = "run workflows/prepare.py again with the same options and --out to make it anew"


class PreparedDataset:
    """The samples of a data directory, sorted by image id.

    Every byte of a sample is one that prepare wrote: each read checks the checksums of the row's pages. Of a shard on
    disk, each process also compares the hash with the manifest's before it reads the first row; in an object store,
    that would be to fetch all of every shard for a row of each, so there `verify` alone does it.

    Holds no open file and no row, so it is cheap to send to another process.

    Attributes:
        root: Where it lies.
        manifest: What prepare recorded: shards, classes, settings, versions.
        classes: Class names, [0] is "background".
        num_labels: L = K + 1.
        image_ids: The ids, in the order of the samples.

    Raises:
        FileNotFoundError: If the directory has no manifest, or lacks one of its shards.
        ValueError: If the manifest is damaged, or a shard has another size.
    """

    def __init__(self, root: Place) -> None:
        self.root = StoragePath.of(root)
        self.manifest = read_manifest(self.root)
        self.classes: tuple[str, ...] = tuple(self.manifest["classes"])
        self.num_labels = len(self.classes)
        self._shards: dict[str, dict[str, Any]] = {shard["file"]: shard for shard in self.manifest["shards"]}
        sizes = self.root.files()
        for file in self._shards:
            self._check_size(file, sizes.get(file))
        self._rows = [(file, row) for file, shard in self._shards.items() for row in range(len(shard["image_ids"]))]
        self.image_ids: tuple[str, ...] = tuple(i for shard in self._shards.values() for i in shard["image_ids"])
        self._verified: set[str] = set()
        self._footers: dict[str, pq.FileMetaData] = {}

    @property
    def digest(self) -> str:
        """SHA-256 of what all the samples are: equal for two directories with the same content."""
        return digest([self.manifest["classes"], [[s["file"], s["sha256"]] for s in self.manifest["shards"]]])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Raises:
            FileNotFoundError: If its shard is missing.
            ValueError: If its shard is damaged; names it.
        """
        file, row = self._rows[index]
        if self.root.local is not None:
            self._verify(file)
        with self.reading(file, f"row {row}"):
            sample = decode_row(self._read(file, row))
        if sample.image_id != self.image_ids[index]:
            raise self._damaged(file, f"expected image {self.image_ids[index]} in row {row}, got {sample.image_id}")
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_verified": set(), "_footers": {}}  # another process may see other bytes

    def subset(self, indices: Iterable[int]) -> PreparedDataset:
        """The samples at `indices`, in their order, as a data set of its own that reads the same shards."""
        part, indices = copy.copy(self), list(indices)
        part._rows = [self._rows[index] for index in indices]
        part.image_ids = tuple(self.image_ids[index] for index in indices)
        return part

    def foreground_sources(self, index: int) -> list[str]:
        """What made the foreground of each of a sample's detections, such as "grabcut". Raises as `[index]`."""
        (file, row), column = self._rows[index], "detections.list.element.foreground_source"
        with self.reading(file, f"row {row}"):
            return [entry["foreground_source"] for entry in self._read(file, row, [column])["detections"]]

    @contextmanager
    def reading(self, file: str, part: str) -> Iterator[None]:
        """Turn whatever is raised inside into a ValueError that says which part of which shard is damaged.

        A damaged page can make pyarrow raise nearly anything. What tells of the store, or of no shard, passes.
        """
        try:
            yield
        except (StorageError, FileNotFoundError):
            raise
        except Exception as error:
            raise self._damaged(file, f"{part} cannot be read: {' '.join(str(error).split())}") from error

    def verify(self) -> None:
        """Compare the hash of every shard with the manifest's.

        Raises:
            FileNotFoundError: If a shard is missing.
            ValueError: If one is damaged; names it.
        """
        for file in self._shards:
            self._verify(file)

    def _read(self, file: str, row: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """In a store one request for the row, after two for the footer of a shard that is new to this process."""
        with (
            (self.root / file).open() as source,
            pq.ParquetFile(
                source, metadata=self._footers.get(file), page_checksum_verification=True, pre_buffer=True
            ) as shard,
        ):
            self._footers[file] = shard.metadata
            return shard.read_row_group(row, columns).to_pylist()[0]

    def _verify(self, file: str) -> None:
        if file in self._verified:
            return
        self._check_size(file, (self.root / file).size())
        expected, got = self._shards[file]["sha256"], sha256_of(self.root / file)
        if got != expected:
            raise self._damaged(file, f"expected SHA-256 {expected}, got {got}")
        self._verified.add(file)

    def _check_size(self, file: str, size: int | None) -> None:
        expected = self._shards[file]["num_bytes"]
        if size is None:
            raise FileNotFoundError(f"data directory {self.root}: shard {file} is missing; {_ADVICE}")
        if size != expected:
            raise self._damaged(file, f"expected {expected} bytes, got {size}")

    def _damaged(self, file: str, reason: str) -> ValueError:
        return ValueError(f"data directory {self.root}: shard {file} is damaged: {reason}; {_ADVICE}")


def read_ahead(read: Callable[[int], Sample], indices: Sequence[int], num_ahead: int = 8) -> Generator[Sample]:
    """What `read` makes of `indices`, in their order; the next `num_ahead` are read while one is worked on."""
    ahead = deque[Future[Sample]]()
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        ahead.extend(pool.submit(read, index) for index in indices[:num_ahead])
        left = iter(indices[num_ahead:])
        while ahead:
            sample = ahead.popleft().result()
            ahead.extend(pool.submit(read, index) for index in islice(left, 1))
            yield sample


def read_manifest(root: StoragePath) -> dict[str, Any]:
    """The manifest of a data directory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of another format.
    """
    path = root / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"data directory {root}: no {MANIFEST} in it; run workflows/prepare.py first") from None
    version = _format_of(path, content)
    if version != FORMAT_VERSION:
        advice = "prepare into another directory"
        raise ValueError(f"{path}: expected data format {FORMAT_VERSION}, got {version}; {advice}")
    try:
        return read_json(path)
    except ValueError:
        raise _damaged_manifest(path) from None


def _format_of(path: StoragePath, content: bytes) -> object:
    """The one entry whose place is the same in all formats."""
    try:
        return json.loads(content)["versions"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged_manifest(path) from None


def _damaged_manifest(path: StoragePath) -> ValueError:
    return ValueError(f"{path}: damaged; delete it and run workflows/prepare.py again")
