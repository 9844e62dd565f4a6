"""What is in a data directory, counted without decoding an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from instseg.data.dataset import PreparedDataset
from instseg.data.quarantine import QUARANTINE, count_by_kind, read_quarantine
from instseg.structures import BACKGROUND

_COLUMNS = [
    *("source", "height", "width", "instance_labels", "semantic_logits.shape"),
    *(f"detections.list.element.{name}" for name in ("label", "foreground_source")),
]
_BATCH = 1024  # rows of these columns in memory at a time


class Spread(NamedTuple):
    """The least, the middle and the greatest of some numbers."""

    least: int
    median: float
    greatest: int

    @staticmethod
    def of(counts: Mapping[int, int]) -> Spread:
        """Of at least one number; `counts` says how often each is there."""
        values = sorted(counts)
        every = np.repeat(values, [counts[value] for value in values])
        return Spread(values[0], float(np.median(every)), values[-1])


@dataclass(frozen=True)
class DataSummary:
    """What is in a data directory.

    Attributes:
        sources: Images by the data set that they come from.
        num_with_instances: Images with a true instance.
        num_with_logits: Images with the logits of a semantic network.
        notes: Images by what was done to them, such as turned upright.
        instances: True instances by class; every foreground class is there.
        detections: Detections by class; every foreground class is there.
        foregrounds: Detections by what made their foreground.
        width: Of the images, in pixels.
        height: Likewise.
        detections_per_image: How many an image has.
        quarantined: Bad items by kind of reason.
        num_shards: Parquet files.
        num_bytes: Their size.
        versions: Of our format and the libraries that wrote them.
        digest: `PreparedDataset.digest`.
    """

    sources: dict[str, int]
    num_with_instances: int
    num_with_logits: int
    notes: dict[str, int]
    instances: dict[str, int]
    detections: dict[str, int]
    foregrounds: dict[str, int]
    width: Spread
    height: Spread
    detections_per_image: Spread
    quarantined: dict[str, int]
    num_shards: int
    num_bytes: int
    versions: dict[str, Any]
    digest: str

    @property
    def num_images(self) -> int:
        """Rows of the shards."""
        return sum(self.sources.values())

    @staticmethod
    def of(dataset: PreparedDataset) -> DataSummary:
        """Count over the rows of the whole directory, also those that a subset leaves out.

        Of each shard, the columns that are counted alone are read, some rows at a time.

        Raises:
            FileNotFoundError: If a shard, or the table of what was quarantined, is missing.
            ValueError: If there are no images, or what is read is damaged; names it.
        """
        tally = _Tally()
        for row in _rows(dataset):
            tally.add(row)
        if not tally.sources:
            raise ValueError(f"data directory {dataset.root}: has no images")
        shards, classes = dataset.manifest["shards"], dataset.classes
        return DataSummary(
            sources=_sorted(tally.sources),
            num_with_instances=tally.num_with_instances,
            num_with_logits=tally.num_with_logits,
            notes=dataset.manifest.get("notes", {}),
            instances={name: tally.instances[label] for label, name in enumerate(classes) if label != BACKGROUND},
            detections={name: tally.detections[label] for label, name in enumerate(classes) if label != BACKGROUND},
            foregrounds=_sorted(tally.foregrounds),
            width=Spread.of(tally.width),
            height=Spread.of(tally.height),
            detections_per_image=Spread.of(tally.detections_per_image),
            quarantined=_quarantined(dataset),
            num_shards=len(shards),
            num_bytes=sum(shard["num_bytes"] for shard in shards),
            versions=dataset.manifest["versions"],
            digest=dataset.digest,
        )

    def tables(self) -> list[list[list[str]]]:
        """The numbers as tables of cells, of which each first row is a head; the most frequent classes first."""
        by_class = sorted(self.instances, key=lambda name: (-self.instances[name], -self.detections[name]))
        spreads = {"width [px]": self.width, "height [px]": self.height, "detections": self.detections_per_image}
        return [
            [
                ["images", str(self.num_images)],
                *_rows_of({f"from {source}": number for source, number in self.sources.items()}),
                ["with true instances", str(self.num_with_instances)],
                ["with logits", str(self.num_with_logits)],
                *_rows_of(self.notes),
            ],
            [
                ["of an image", "least", "median", "most"],
                *([name, *(f"{number:g}" for number in spread)] for name, spread in spreads.items()),
            ],
            [
                ["class", "instances", "detections"],
                *([name, str(self.instances[name]), str(self.detections[name])] for name in by_class),
                ["all", str(sum(self.instances.values())), str(sum(self.detections.values()))],
            ],
            [["foregrounds from", "detections"], *_rows_of(self.foregrounds)],
            [["quarantined because", "items"], *_rows_of(self.quarantined or {"(nothing was)": 0})],
            [
                ["shards", str(self.num_shards)],
                ["bytes", f"{self.num_bytes:,}"],
                *([f"version of {name}", str(version)] for name, version in self.versions.items()),
            ],
            [["digest", self.digest]],
        ]


@dataclass
class _Tally:
    """What is counted row by row; how often each label, source or number was there."""

    sources: Counter[str] = field(default_factory=Counter)
    num_with_instances: int = 0
    num_with_logits: int = 0
    instances: Counter[int] = field(default_factory=Counter)
    detections: Counter[int] = field(default_factory=Counter)
    foregrounds: Counter[str] = field(default_factory=Counter)
    width: Counter[int] = field(default_factory=Counter)
    height: Counter[int] = field(default_factory=Counter)
    detections_per_image: Counter[int] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> None:
        labels = [label for label in row["instance_labels"] if label != BACKGROUND]  # which an id without pixels has
        self.sources[row["source"]] += 1
        self.num_with_instances += bool(labels)
        self.num_with_logits += row["semantic_logits"] is not None
        self.instances.update(labels)
        self.detections.update(entry["label"] for entry in row["detections"])
        self.foregrounds.update(entry["foreground_source"] for entry in row["detections"])
        self.width[row["width"]] += 1
        self.height[row["height"]] += 1
        self.detections_per_image[len(row["detections"])] += 1


def _rows(dataset: PreparedDataset) -> Iterator[dict[str, Any]]:
    """`_COLUMNS` of every row; a damaged byte of another column is not met."""
    for file in (shard["file"] for shard in dataset.manifest["shards"]):
        with (
            dataset.reading(file, "a column"),
            (dataset.root / file).open() as source,
            pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True) as shard,
        ):
            for batch in shard.iter_batches(_BATCH, columns=_COLUMNS):
                yield from batch.to_pylist()


def _quarantined(dataset: PreparedDataset) -> dict[str, int]:
    if not dataset.manifest.get("num_quarantined"):
        return {}
    return count_by_kind(read_quarantine(dataset.root / QUARANTINE))


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _rows_of(counts: Mapping[str, int]) -> list[list[str]]:
    return [[name, str(number)] for name, number in counts.items()]
