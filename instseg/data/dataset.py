"""Random access to a data directory that workflows/prepare.py wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instseg.data.schema import FORMAT_VERSION, decode_row
from instseg.structures import Sample

MANIFEST = "manifest.json"


class PreparedDataset:
    """The samples of a data directory, sorted by image id.

    Holds no open file and no row, so it is cheap to send to another process.

    Attributes:
        manifest: What prepare recorded: shards, classes, settings, versions.
        classes: Class names, [0] is "background".
        num_labels: L = K + 1.
        image_ids: The ids, in the order of the samples.

    Raises:
        FileNotFoundError: If the directory has no manifest, or lacks one of its shards.
        ValueError: If the manifest or a shard is damaged.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.classes: tuple[str, ...] = tuple(self.manifest["classes"])
        self.num_labels = len(self.classes)
        for shard in self.manifest["shards"]:
            self._check_shard(shard["file"], shard["num_rows"])
        self._rows = [(s["file"], row) for s in self.manifest["shards"] for row in range(s["num_rows"])]
        self.image_ids: tuple[str, ...] = tuple(i for s in self.manifest["shards"] for i in s["image_ids"])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        file, row = self._rows[index]
        with pq.ParquetFile(self.root / file) as shard:
            return decode_row(shard.read_row_group(row).to_pylist()[0])

    def _check_shard(self, file: str, num_rows: int) -> None:
        advice = "run workflows/prepare.py again with the same --out to complete it"
        path = self.root / file
        if not path.is_file():
            raise FileNotFoundError(f"data directory {self.root}: shard {file} is missing; {advice}")
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"data directory {self.root}: shard {file} is damaged ({error}); {advice}") from None
        if metadata.num_rows != num_rows or metadata.num_row_groups != num_rows:
            got = f"expected {num_rows} rows, got {metadata.num_rows}"
            raise ValueError(f"data directory {self.root}: shard {file}: {got}; {advice}")


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a data directory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of another format.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"data directory {root}: no {MANIFEST} in it; run workflows/prepare.py first")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["versions"]["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged; delete it and run workflows/prepare.py again") from None
    if version != FORMAT_VERSION:
        advice = "prepare into another directory"
        raise ValueError(f"{path}: expected data format {FORMAT_VERSION}, got {version}; {advice}")
    return manifest
