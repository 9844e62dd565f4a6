"""Reader of the PASCAL VOC devkit layout: JPEGImages, SegmentationClass, SegmentationObject, ImageSets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from instseg.data.images import ImageFile, decode_image, decode_photograph
from instseg.data.quarantine import QuarantineRow, blame
from instseg.data.source import Item, Listing, Truth, read_ids
from instseg.storage import Place, StoragePath
from instseg.structures import BACKGROUND, IGNORE_LABEL, VOID

BACKGROUND_NAME = "background"
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class VocDevkit:
    """One VOCyyyy folder, a `Source`. `open_devkit` finds it.

    Attributes:
        root: The folder.
        classes: Class names, [0] is background.
        has_truth: Whether its images have masks.
    """

    root: StoragePath
    classes: tuple[str, ...] = (BACKGROUND_NAME, *VOC_CLASSES)
    has_truth: bool = True

    @property
    def categories(self) -> dict[int, int]:
        """Category ids are labels."""
        return {label: label for label in range(1, len(self.classes))}

    def list_split(self, split: str) -> Listing:
        """The images of a split. If one has a mask, all are expected to.

        Raises:
            FileNotFoundError: If there is no such split; the message lists those that exist.
            ValueError: If the split is not UTF-8 or has no id.
        """
        ids, quarantined = self.image_ids(split)
        folders = (self.root / "SegmentationClass", self.root / "SegmentationObject")
        has_truth = any(not _stems(folder, ".png").isdisjoint(ids) for folder in folders)
        known = _stems(self.root / "JPEGImages", ".jpg").union(ids)
        items = [Item(image_id, "voc") for image_id in ids]
        return Listing(replace(self, has_truth=has_truth), items, frozenset(known), quarantined)

    def image_ids(self, split: str) -> tuple[list[str], list[QuarantineRow]]:
        """The ids of a split, sorted, each once, and what else stands there; raises as `list_split`."""
        folder = self.root / "ImageSets" / "Segmentation"
        path, suffix = folder / f"{split}.txt", ".txt"
        if path.size() is None:
            found = ", ".join(name.removesuffix(suffix) for name in folder.files() if name.endswith(suffix)) or "none"
            raise FileNotFoundError(f"split {split!r}: no file {path}; splits that exist: {found}")
        return read_ids(path)

    def files(self, item: Item) -> list[StoragePath]:
        """Image, class mask, object mask, whether they exist or not."""
        return [
            self.root / "JPEGImages" / f"{item.image_id}.jpg",
            self.root / "SegmentationClass" / f"{item.image_id}.png",
            self.root / "SegmentationObject" / f"{item.image_id}.png",
        ]

    def read_image(self, item: Item) -> ImageFile:
        """The file and its pixels.

        Raises:
            CorruptItemError: If the file is missing, damaged, or neither JPEG nor PNG.
        """
        path = self.files(item)[0]
        with blame(item.image_id, _name(path)):
            return decode_photograph(path.read_bytes(), rotate=False)

    def read_truth(self, item: Item, size: tuple[int, int]) -> Truth | None:
        """Ground truth of an image of `size` (height, width), if it has masks.

        Raises:
            CorruptItemError: If a mask is missing, damaged, of another size, or has a class that does not exist.
        """
        if not self.has_truth:
            return None
        _, class_path, object_path = self.files(item)
        with blame(item.image_id, _name(class_path)):
            semantic = _read_palette(class_path, size)
            unknown = [int(c) for c in np.unique(semantic) if len(self.classes) <= c != IGNORE_LABEL]
            if unknown:
                raise ValueError(f"expected classes 0..{len(self.classes) - 1} and 255, got {unknown}")
        with blame(item.image_id, _name(object_path)):
            instances = _read_palette(object_path, size).astype(np.int32)
            instances[instances == IGNORE_LABEL] = VOID
            return Truth(semantic, instances, instance_classes(semantic, instances))


def _name(path: StoragePath) -> str:
    """A file of the devkit relative to its folder."""
    return f"{path.parent.name}/{path.name}"


def _stems(folder: StoragePath, suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in folder.files() if name.endswith(suffix)}


def open_devkit(path: Place, classes: tuple[str, ...] = (BACKGROUND_NAME, *VOC_CLASSES)) -> VocDevkit:
    """The devkit at `path`, which is VOC2012 itself or a folder with exactly one VOCyyyy.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several to choose from.
    """
    root = StoragePath.of(path)
    if not root.is_folder():
        raise FileNotFoundError(f"devkit {path}: no such folder")
    if (root / "JPEGImages").is_folder():
        return VocDevkit(_complete(root), classes)
    found = [root / name for name in root.folders() if name.startswith("VOC")]
    if len(found) > 1:
        raise ValueError(f"devkit {path}: name one of {', '.join(str(folder) for folder in found)}")
    if not found:
        raise FileNotFoundError(f"devkit {path}: expected JPEGImages/ or one VOCyyyy/ in it, found neither")
    return VocDevkit(_complete(found[0]), classes)


def _complete(root: StoragePath) -> StoragePath:
    for name in ("JPEGImages", "ImageSets/Segmentation"):
        if not (root / name).is_folder():
            raise FileNotFoundError(f"devkit {root}: expected the folder {name}/ in it, which is missing")
    return root


def _read_palette(path: StoragePath, size: tuple[int, int]) -> np.ndarray:
    image = decode_image(path.read_bytes())
    if image.mode not in ("P", "L"):  # RGB would turn palette indices into colours
        raise ValueError(f"expected an indexed PNG, got mode {image.mode}")
    if image.size[::-1] != size:
        expected = f"the image's {size[1]}x{size[0]} pixels"
        raise ValueError(f"expected {expected}, got {image.size[0]}x{image.size[1]}")
    return np.array(image)


def instance_classes(semantic: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """The class under each instance: the most frequent one among its pixels that are not void.

    Args:
        semantic: (H, W) uint8, 255 void.
        instances: (H, W) int32, 0 background, 1..G, -1 void.

    Returns:
        (G,) int64, 0 where an id has no pixel.

    Raises:
        ValueError: If an instance lies on background or void alone.
    """
    labels = np.zeros(max(int(instances.max(initial=0)), 0), np.int64)
    for instance in np.unique(instances[instances > 0]):
        classes = semantic[instances == instance]
        classes = classes[(classes != IGNORE_LABEL) & (classes != BACKGROUND)]
        if not classes.size:
            raise ValueError(f"instance {instance} has no class: only background or void lies under it")
        labels[instance - 1] = np.bincount(classes).argmax()
    return labels


def voc_palette() -> list[int]:
    """The colours of VOC's indexed PNGs: the bits of the index spread over red, green and blue."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
