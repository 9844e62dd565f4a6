"""Reader of COCO-format instances: one JSON with its own categories, and a folder of photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from instseg.data.categories import match_classes
from instseg.data.coco_index import add_annotations, category_names, collect_images, read_index
from instseg.data.coco_masks import decode_segmentation
from instseg.data.images import ImageFile, decode_photograph
from instseg.data.quarantine import LeftOut, blame
from instseg.data.source import Item, Listing, Truth
from instseg.data.voc import BACKGROUND_NAME
from instseg.storage import Place, StoragePath
from instseg.structures import IGNORE_LABEL, VOID

MAX_INSTANCES = 65534  # ids of a 16-bit map whose highest value is void


@dataclass(frozen=True)
class CocoImages:
    """The photographs of a COCO-format data set, a `Source`. What the JSON says of one is its item's record.

    Attributes:
        root: The folder that file names are relative to.
        index: The JSON's name, for messages.
        classes: Class names, [0] is background.
        categories: The label of each category id; 0 where it is none of the classes.
        min_pixels: Images with fewer pixels of the classes are left out.
    """

    root: StoragePath
    index: str
    classes: tuple[str, ...]
    categories: Mapping[int, int]
    min_pixels: int = 0

    def files(self, item: Item) -> list[StoragePath]:
        """The photograph, whether it exists or not."""
        return [self.root / item.record["file_name"]]

    def read_image(self, item: Item) -> ImageFile:
        """The file and its pixels.

        Raises:
            CorruptItemError: If the file is missing, damaged, neither JPEG nor PNG, or not of the JSON's size.
        """
        with blame(item.image_id, item.record["file_name"]):
            image = decode_photograph(self.files(item)[0].read_bytes(), rotate=False)
            _check_size(item, image.pixels.shape[:2])
            return image

    def read_truth(self, item: Item, size: tuple[int, int]) -> Truth:
        """Ground truth of an image of `size` (height, width), instances in the order of their annotations' ids.

        Void, in both maps, are pixels of several instances, and those of a crowd without an instance. An instance that
        has no pixel of its own keeps its id, with label 0.

        Raises:
            CorruptItemError: If one of its annotations cannot be used, for a mask with a hole is a wrong one.
            LeftOut: If fewer than `min_pixels` pixels have one of the classes.
        """
        with blame(item.image_id, self.index):
            _check_size(item, size)
        instances, labels = np.zeros(size, np.int32), [0]
        overlaps, crowds = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        for annotation in item.record["annotations"]:
            with blame(item.image_id, f"{self.index}[annotation {annotation['id']}]"):
                mask = decode_segmentation(annotation["segmentation"], size)
            if annotation["iscrowd"]:
                crowds |= mask
                continue
            overlaps |= mask & (instances > 0)
            instances[mask] = len(labels)
            labels.append(self.categories[annotation["category_id"]])
        with blame(item.image_id, self.index):
            if len(labels) - 1 > MAX_INSTANCES:
                raise ValueError(f"more than {MAX_INSTANCES} instances: {len(labels) - 1}")
        void = overlaps | (crowds & (instances == 0))
        return self._finish(instances, np.array(labels), void)

    def _finish(self, instances: np.ndarray, labels: np.ndarray, void: np.ndarray) -> Truth:
        """`labels` [0] is the background's."""
        instances[void] = 0
        num_pixels = np.bincount(instances.ravel(), minlength=len(labels))
        if num_pixels[1:].sum() < self.min_pixels:
            raise LeftOut(f"fewer than {self.min_pixels} pixels of the classes")
        labels[num_pixels == 0] = 0
        semantic = labels[instances].astype(np.uint8)
        semantic[void], instances[void] = IGNORE_LABEL, VOID
        return Truth(semantic, instances, labels[1:])


def list_coco(
    annotations: Place, images: Place, classes: tuple[str, ...] | None = None, min_pixels: int = 0
) -> Listing:
    """The images of a COCO-format JSON, which is read whole; the id of an image is the text of its `id`.

    What is wrong with one image or annotation is in the listing's `quarantined`: of images with one id the first is
    taken; an image with a bad annotation is not, for nobody knows what of it is background.

    Args:
        annotations: JSON with lists `images`, `annotations`, `categories`.
        images: The folder that its file names are relative to.
        classes: Foreground class names, matched with its categories by name; by default all of them, by id.
        min_pixels: Images with fewer pixels of the classes will be left out when they are read.

    Raises:
        FileNotFoundError: If the JSON or the folder is missing.
        ValueError: If the JSON has not these lists, its categories are malformed or lack one of the classes, or there
            are more than 254.
    """
    path, root = StoragePath.of(annotations), StoragePath.of(images)
    if not root.is_folder():
        raise FileNotFoundError(f"images {images}: no such folder")
    content = read_index(path)
    names = category_names(path, content["categories"])
    if classes is None:
        classes = tuple(dict.fromkeys(names[id_] for id_ in sorted(names) if names[id_] != BACKGROUND_NAME))
    labels = (BACKGROUND_NAME, *classes)
    categories = match_classes(names, labels)
    _check_classes(path, labels, categories, names)
    records, known, rows = collect_images(content["images"], path.name)
    rows += add_annotations(content["annotations"], records, known, categories, path.name)
    items = [Item(image_id, "coco", records[image_id]) for image_id in sorted(records)]
    return Listing(CocoImages(root, path.name, labels, categories, min_pixels), items, frozenset(known), rows)


def _check_classes(
    path: StoragePath, labels: tuple[str, ...], categories: dict[int, int], names: dict[int, str]
) -> None:
    missing = [labels[label] for label in sorted(set(range(1, len(labels))) - set(categories.values()))]
    if missing:
        raise ValueError(f"annotations {path}: has no category {missing}; it has {sorted(set(names.values()))}")
    if not 1 < len(labels) <= IGNORE_LABEL:
        raise ValueError(f"annotations {path}: expected 1..{IGNORE_LABEL - 1} classes, got {len(labels) - 1}")


def _check_size(item: Item, got: tuple[int, ...]) -> None:
    expected = item.record["height"], item.record["width"]
    if got != expected:
        raise ValueError(f"image of another size: expected (height, width) {expected} as the JSON says, got {got}")
