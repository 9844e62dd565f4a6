"""Reader of the Semantic Boundaries Dataset, alone or with a VOC devkit (trainaug)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instseg.data.images import ImageFile, decode_photograph
from instseg.data.matlab import read_struct
from instseg.data.quarantine import QuarantineRow, blame
from instseg.data.source import Item, Listing, Truth, read_ids
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES, VocDevkit
from instseg.storage import Place, StoragePath

_CLASSES = (BACKGROUND_NAME, *VOC_CLASSES)
# Images of each split of the whole data set; trainaug with VOC 2012.
NUM_IMAGES = {"train": 8498, "val": 2857, "train_noval": 5623, "all": 11355, "trainaug": 10582}


@dataclass(frozen=True)
class SbdFolder:
    """The folder of SBD, and the devkit that items with source "voc" are of; a `Source`.

    SBD has no void. Its instances are numbered as in the file.

    Attributes:
        root: The folder with img/, cls/, inst/.
        devkit: VOC, None if there is none.
    """

    root: StoragePath
    devkit: VocDevkit | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The background and VOC's classes."""
        return _CLASSES

    @property
    def categories(self) -> dict[int, int]:
        """Category ids are labels."""
        return {label: label for label in range(1, len(_CLASSES))}

    def files(self, item: Item) -> list[StoragePath]:
        """Image, classes, instances, whether they exist or not."""
        if (devkit := self._devkit_of(item)) is not None:
            return devkit.files(item)
        kinds = (("img", "jpg"), ("cls", "mat"), ("inst", "mat"))
        return [self.root / folder / f"{item.image_id}.{suffix}" for folder, suffix in kinds]

    def read_image(self, item: Item) -> ImageFile:
        """The file and its pixels.

        Raises:
            CorruptItemError: If the file is missing, damaged, or neither JPEG nor PNG.
        """
        if (devkit := self._devkit_of(item)) is not None:
            return devkit.read_image(item)
        path = self.files(item)[0]
        with blame(item.image_id, f"img/{path.name}"):
            return decode_photograph(path.read_bytes(), rotate=False)

    def read_truth(self, item: Item, size: tuple[int, int]) -> Truth | None:
        """Ground truth of an image of `size` (height, width): GTcls.Segmentation, GTinst.{Segmentation, Categories}.

        Raises:
            CorruptItemError: If a file or field is missing, damaged, of another size, or has a class that does not
                exist; or is a decompression bomb.
        """
        if (devkit := self._devkit_of(item)) is not None:
            return devkit.read_truth(item, size)
        _, class_path, instance_path = self.files(item)
        with blame(item.image_id, f"cls/{class_path.name}"):
            (semantic,) = read_struct(class_path.read_bytes(), "GTcls", "Segmentation")
            _check("GTcls.Segmentation", semantic, size, 0, len(_CLASSES) - 1)
        with blame(item.image_id, f"inst/{instance_path.name}"):
            instances, categories = read_struct(instance_path.read_bytes(), "GTinst", "Segmentation", "Categories")
            labels = np.ravel(categories)
            _check("GTinst.Categories", labels, labels.shape, 1, len(_CLASSES) - 1)
            _check("GTinst.Segmentation", instances, size, 0, labels.size)
            absent = ~np.isin(np.arange(1, labels.size + 1), instances)
            return Truth(
                semantic.astype(np.uint8), instances.astype(np.int32), np.where(absent, 0, labels).astype(np.int64)
            )

    def _devkit_of(self, item: Item) -> VocDevkit | None:
        return self.devkit if item.source == "voc" else None


def list_sbd(root: Place, split: str, devkit: VocDevkit | None = None) -> Listing:
    """The images of a split: "train", "val", both of them as "all", "train_noval" if SBD has that list, "trainaug".

    "trainaug" is all of SBD but VOC's val, and VOC's train. Of images that both have, it takes VOC's masks, which have
    a void border. "train" and "val" are SBD's own: either has images of VOC's val.

    Args:
        root: The folder with img/, cls/, inst/, train.txt, val.txt; or the benchmark's, where dataset/ is it.
        split: One of the above.
        devkit: VOC 2012, for "trainaug".

    Raises:
        FileNotFoundError: If a part of SBD is missing, or a list of ids.
        ValueError: If a list is malformed, there is no such split, or one of another number of images than
            `NUM_IMAGES` although SBD is complete; if "trainaug" is asked for without a devkit, or with one of other
            classes.
    """
    if split not in NUM_IMAGES:
        raise ValueError(f"split: expected one of {', '.join(NUM_IMAGES)}, got {split!r}")
    folder = _find(StoragePath.of(root))
    lists = {name: read_ids(folder / f"{name}.txt") for name in ("train", "val")}
    whole = {image_id for ids, _ in lists.values() for image_id in ids}
    if split == "train_noval":
        lists[split] = _read_noval(folder)
    parts = [lists[split]] if split in lists else list(lists.values())
    sources = {image_id: "sbd" for ids, _ in parts for image_id in ids}
    rows = [row for _, found in parts for row in found]
    known = whole | sources.keys()
    if split == "trainaug":
        known |= _add_voc(sources, rows, devkit)
    if len(whole) == NUM_IMAGES["all"] and len(sources) != NUM_IMAGES[split]:
        expected = f"{NUM_IMAGES[split]} images"
        raise ValueError(f"sbd {root}: split {split}: expected {expected}, got {len(sources)}; a list is not complete")
    items = [Item(image_id, sources[image_id]) for image_id in sorted(sources)]
    return Listing(SbdFolder(folder, devkit), items, frozenset(known), rows)


def _add_voc(sources: dict[str, str], rows: list[QuarantineRow], devkit: VocDevkit | None) -> frozenset[str]:
    """Take VOC's val away from what each image is of, put its train into it; returns all ids that VOC has."""
    if devkit is None or devkit.classes != _CLASSES:
        got = "none" if devkit is None else f"one with classes {devkit.classes[1:]}"
        raise ValueError(f"split trainaug: expected a VOC devkit with its 20 classes, got {got}; set --devkit")
    listing, (val, found) = devkit.list_split("train"), devkit.image_ids("val")
    for image_id in val:
        sources.pop(image_id, None)
    sources |= {item.image_id: "voc" for item in listing.items}
    rows += listing.quarantined + found
    return listing.known_ids


def _read_noval(folder: StoragePath) -> tuple[list[str], list[QuarantineRow]]:
    path = folder / "train_noval.txt"
    if path.size() is None:
        raise FileNotFoundError(
            f"split train_noval: no file {path}; it is not in SBD's archive, but published beside it"
        )
    return read_ids(path)


def _find(root: StoragePath) -> StoragePath:
    folder = root / "dataset" if (root / "dataset").is_folder() else root
    folders, files = ("img", "cls", "inst"), ("train.txt", "val.txt")
    missing = [f"{name}/" for name in folders if not (folder / name).is_folder()]
    missing += [name for name in files if (folder / name).size() is None]
    if missing:
        raise FileNotFoundError(f"sbd {root}: expected {', '.join(missing)} in {folder}, which is missing")
    return folder


def _check(name: str, values: np.ndarray, shape: tuple[int, ...], low: int, high: int) -> None:
    """Raise ValueError unless they are integers low..high of this shape; MATLAB's numbers are floats by default."""
    if values.shape != shape:
        raise ValueError(f"{name} of another size: expected {shape}, got {values.shape}")
    whole = values.dtype.kind in "buif" and np.isin(values, np.arange(low, high + 1)).all()
    if not whole:
        raise ValueError(f"{name}: expected integers {low}..{high}, got {np.unique(values)} of type {values.dtype}")
