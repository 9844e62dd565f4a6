"""Photographs without ground truth: a folder, a glob, or one file."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from instseg.data.images import ImageFile, decode_photograph
from instseg.data.quarantine import QuarantineRow, blame
from instseg.data.source import Item, Listing, is_plain
from instseg.storage import Place, StoragePath

log = logging.getLogger(__name__)
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageFolder:
    """Photographs below a folder, a `Source` without ground truth. An item's record has its file.

    Attributes:
        root: The folder.
        classes: Class names that predictions have, [0] is background.
    """

    root: StoragePath
    classes: tuple[str, ...]

    @property
    def categories(self) -> dict[int, int]:
        """Category ids are labels."""
        return {label: label for label in range(1, len(self.classes))}

    def files(self, item: Item) -> list[StoragePath]:
        """The photograph, whether it exists or not."""
        return [self.root / item.record["file_name"]]

    def read_image(self, item: Item) -> ImageFile:
        """The file and its pixels, turned as its EXIF orientation says.

        Raises:
            CorruptItemError: If the file is missing, damaged, or neither JPEG nor PNG.
        """
        with blame(item.image_id, item.record["file_name"]):
            return decode_photograph(self.files(item)[0].read_bytes())

    def read_truth(self, item: Item, size: tuple[int, int]) -> None:
        """There is none."""


def list_folder(images: Place, classes: tuple[str, ...]) -> Listing:
    """The photographs of a folder and all below it, of a glob such as `album/**/*.jpg`, or one file.

    Only .jpg, .jpeg and .png, in any case, are looked at; the number of others is logged. Hidden files and folders,
    and folders that are symbolic links, are passed over. An id is the path below the folder (that before the glob's
    first wildcard), without its suffix: "a/b c.jpg" becomes "a__b_c". Of two with the same id, the second is in the
    listing's `quarantined`.

    Args:
        images: The folder, glob or file, on disk or in an object store; a `?` in a URI begins its options.
        classes: Class names that predictions will have, [0] is background.

    Raises:
        FileNotFoundError: If there is no photograph.
    """
    root, pattern = _split(StoragePath.of(images))
    names = sorted({*_expand(root, pattern)})
    photographs = [name for name in names if name.lower().endswith(_SUFFIXES)]
    num_others = len(names) - len(photographs)
    if not photographs:
        raise FileNotFoundError(f"images {images}: no {', '.join(_SUFFIXES)} there, and {num_others} other files")
    if num_others:
        log.warning("images %s: %d files are not looked at: no %s", images, num_others, ", ".join(_SUFFIXES))
    items: dict[str, Item] = {}
    rows = []
    for name in photographs:
        image_id = _to_id(name)
        if not is_plain(image_id):
            rows.append(QuarantineRow(image_id, name, "id is not a plain file name"))
        elif image_id in items:
            other = items[image_id].record["file_name"]
            rows.append(QuarantineRow(image_id, name, f"has the same id as another file: {other}"))
        else:
            items[image_id] = Item(image_id, "folder", {"file_name": name})
    return Listing(ImageFolder(root, classes), [items[i] for i in sorted(items)], frozenset(items), rows)


def _split(place: StoragePath) -> tuple[StoragePath, list[str]]:
    """A folder, and the pattern of what is meant below it, part by part."""
    if place.is_folder():
        return place, ["**", "*"]
    root, pattern = place.parent, [place.name]
    if place.size() is not None:
        return root, [re.sub(r"([*?\[])", r"[\1]", place.name)]  # itself, whatever its name
    while re.search(r"[*?\[]", root.key):
        root, pattern = root.parent, [root.name, *pattern]
    return root, pattern


def _expand(folder: StoragePath, pattern: list[str]) -> Iterator[str]:
    """Names of the files that match, relative to the folder."""
    head, *rest = pattern
    if head == "**":
        yield from _expand(folder, rest or ["*"])
        below = [name for name in folder.folders() if _matches(name, "*") and not _is_link(folder / name)]
        rest = pattern
    elif rest:
        below = [name for name in folder.folders() if _matches(name, head)]
    else:
        yield from (name for name in folder.files() if _matches(name, head))
        return
    for name in below:
        yield from (f"{name}/{found}" for found in _expand(folder / name, rest))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


def _is_link(path: StoragePath) -> bool:
    return path.local is not None and path.local.is_symlink()


def _to_id(name: str) -> str:
    return re.sub(r"[^\w.\-]", "_", name.rpartition(".")[0].replace("/", "__"))
