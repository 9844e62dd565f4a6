"""What happens to bad items: they are set aside with file and reason, never dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_NAMED = 5  # items that a message names; quarantine.parquet has all of them

SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("image_id", "file", "reason")])


@dataclass(frozen=True, order=True)
class QuarantineRow:
    """One bad item: the image it belongs to, the file relative to its input's root, what is wrong with it."""

    image_id: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.image_id}: {self.file}: {self.reason}"


class CorruptItemError(Exception):
    """A file or record of one image cannot be used; carries the row for the quarantine."""

    def __init__(self, image_id: str, file: str, reason: object) -> None:
        self.row = QuarantineRow(image_id, file, " ".join(str(reason).split()))
        super().__init__(str(self.row))


def write_quarantine(path: Path, rows: Iterable[QuarantineRow]) -> None:
    """Write the rows, sorted, as a Parquet table of three string columns."""
    table = pa.Table.from_pylist([asdict(row) for row in sorted(rows)], schema=SCHEMA)
    pq.write_table(table, path)


def check_share(rows: list[QuarantineRow], num_images: int, max_quarantined: float, file: Path) -> str | None:
    """The warning that names what was quarantined, None if nothing was.

    Raises:
        ValueError: If the share of the `num_images` images with at least one bad item is above `max_quarantined`.
    """
    touched = len({row.image_id for row in rows})
    if not touched:
        return None
    text = f"{len(rows)} bad items in {touched} of {num_images} images ({touched / max(num_images, 1):.1%})"
    named = "".join(f"\n  {row}" for row in sorted(rows)[:NUM_NAMED])
    if touched > max_quarantined * num_images:
        raise ValueError(
            f"{text}, more than --max-quarantined {max_quarantined:g}; all are in {file}, the first:{named}"
        )
    return f"quarantined {text}; all are in {file}, the first:{named}"


def read_quarantine(path: Path) -> list[QuarantineRow]:
    """The rows that `write_quarantine` wrote; none where there is no file."""
    return [QuarantineRow(**row) for row in pq.read_table(path).to_pylist()] if path.is_file() else []
