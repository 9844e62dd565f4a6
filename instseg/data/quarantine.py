"""What happens to bad items: they are set aside with file and reason, never dropped in silence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from instseg.storage import Place, StorageError, StoragePath

QUARANTINE = "quarantine.parquet"
NUM_NAMED = 5  # items that a message names; that file has all of them
_MAX_REASON = 300  # characters: a reason quotes what it got, which may be a number of thousands of digits

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
        self.row = QuarantineRow(image_id, file, " ".join(str(reason).split())[:_MAX_REASON])
        super().__init__(str(self.row))


class LeftOut(Exception):  # noqa: N818, for it is none
    """An image is no part of the data set, by a rule of that set, which the message names; nothing is wrong with it."""


@contextmanager
def blame(image_id: str, file: str) -> Iterator[None]:
    """Turn whatever is raised inside into a `CorruptItemError` of this file, unless it is one of another file.

    Libraries that decode damaged input raise nearly anything, so no list of exceptions would be complete.
    """
    try:
        yield
    except (CorruptItemError, LeftOut, StorageError):  # a store that is down makes no item bad
        raise
    except FileNotFoundError:
        raise CorruptItemError(image_id, file, "file is missing") from None
    except OSError as error:
        raise CorruptItemError(image_id, file, error.strerror or error) from None  # its text has the machine's path
    except ValueError as error:
        raise CorruptItemError(image_id, file, error) from None
    except Exception as error:
        raise CorruptItemError(image_id, file, f"{type(error).__name__}: {error}") from None


def write_quarantine(place: Place, rows: Iterable[QuarantineRow]) -> None:
    """Write the rows, sorted, as a Parquet table of three string columns."""
    values = [{name: _printable(value) for name, value in asdict(row).items()} for row in sorted(rows)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(values, schema=SCHEMA), sink, write_page_checksum=True)
    StoragePath.of(place).publish(sink.getvalue().to_pybytes())


def _printable(text: str) -> str:
    """JSON and file names may hold half of a surrogate pair, which is no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_share(rows: list[QuarantineRow], num_images: int, max_quarantined: float, file: Place) -> str | None:
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


def read_quarantine(place: Place) -> list[QuarantineRow]:
    """The rows that `write_quarantine` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    content = StoragePath.of(place).read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        return [QuarantineRow(**row) for row in table.to_pylist()]
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{place}: damaged ({' '.join(str(error).split())})") from None


def count_by_kind(rows: Iterable[QuarantineRow]) -> dict[str, int]:
    """How many rows there are of each kind of reason, the most frequent first: what stands before its details."""
    kinds = Counter(re.split(r"[:;(]|, got| of \d| \d", row.reason)[0].strip() for row in rows)
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0])))
