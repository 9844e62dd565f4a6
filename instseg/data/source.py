"""What every data set offers: which images a split has, and what belongs to one of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from instseg.data.images import ImageFile
from instseg.data.quarantine import QuarantineRow
from instseg.storage import Place, StoragePath


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        image_id: Unique in its data set; a plain file name, as `is_plain` has it.
        source: What the column `source` says, such as "voc".
        record: JSON values: what the data set's index says of it, such as its annotations; {} where files say it all.
    """

    image_id: str
    source: str
    record: dict[str, Any] = field(default_factory=dict)


class Truth(NamedTuple):
    """Ground truth of one image.

    Attributes:
        semantic: (H, W) uint8, 255 void.
        instances: (H, W) int32, 0 background, 1..G, -1 void.
        instance_labels: (G,) int64, the class of each instance; 0 where the id has no pixel.
    """

    semantic: np.ndarray
    instances: np.ndarray
    instance_labels: np.ndarray


class Source(Protocol):
    """Reads what belongs to an item; small, because every task of a job gets it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, [0] is background."""
        ...

    @property
    def categories(self) -> Mapping[int, int]:
        """The label of each category id that detections of other systems may have; 0 for those to leave out."""
        ...

    def files(self, item: Item) -> list[StoragePath]:
        """All files that the item's row depends on, whether they exist or not."""
        ...

    def read_image(self, item: Item) -> ImageFile:
        """The image.

        Raises:
            CorruptItemError: If the file is missing, damaged, or cannot be used.
        """
        ...

    def read_truth(self, item: Item, size: tuple[int, int]) -> Truth | None:
        """Ground truth of an image of `size` (height, width); None if the data set has none.

        Raises:
            CorruptItemError: If it is missing, damaged, of another size, or has a class that does not exist.
        """
        ...


@dataclass(frozen=True)
class Listing:
    """A split of a data set.

    Attributes:
        source: Reads its items.
        items: Those of the split, by id ascending, each once.
        known_ids: The ids of all images of the data set, whatever their split.
        quarantined: What the index has and cannot be used, such as an id with `../` in it.
    """

    source: Source
    items: list[Item]
    known_ids: frozenset[str]
    quarantined: list[QuarantineRow] = field(default_factory=list)


def read_ids(path: Place) -> tuple[list[str], list[QuarantineRow]]:
    """The image ids of a text file, the first word of each line, sorted and each once; and what cannot be an id.

    Raises:
        ValueError: If it is not UTF-8, or has no id.
    """
    words = Counter(line.split()[0] for line in read_lines(path))
    ids = sorted(word for word in words if is_plain(word))
    if not ids:
        raise ValueError(f"{path}: expected one image id a line, got none")
    file = StoragePath.of(path).name
    rows = [QuarantineRow(word, file, "id is not a plain file name") for word in words if not is_plain(word)]
    rows += [QuarantineRow(i, file, f"id is there {words[i]} times; taken once") for i in ids if words[i] > 1]
    return ids, rows


def is_plain(image_id: str) -> bool:
    """Whether an id can be a file's name on any system: letters, digits, `_`, `-` and dots, which are not all of it."""
    return bool(re.fullmatch(r"[\w\-][\w.\-]*", image_id))


def read_lines(path: Place) -> list[str]:
    """The lines of a text file that are not blank, without white space around them.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        lines = StoragePath.of(path).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got something else: {error}") from None
    return [line.strip() for line in lines if line.strip()]
