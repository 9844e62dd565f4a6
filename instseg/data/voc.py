"""Reader of the PASCAL VOC devkit layout: JPEGImages, SegmentationClass, SegmentationObject, ImageSets."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from instseg.data.quarantine import blame
from instseg.storage import Place, StoragePath
from instseg.structures import BACKGROUND, IGNORE_LABEL

BACKGROUND_NAME = "background"
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = -1


@dataclass(frozen=True)
class VocDevkit:
    """One VOCyyyy folder. `open_devkit` finds it."""

    root: StoragePath

    def image_ids(self, split: str) -> list[str]:
        """The ids of a split, sorted.

        Raises:
            FileNotFoundError: If there is no such split; the message lists those that exist.
            ValueError: If the split is not UTF-8, is empty, repeats an id, or has an id that is no plain file name.
        """
        folder = self.root / "ImageSets" / "Segmentation"
        path, suffix = folder / f"{split}.txt", ".txt"
        if path.size() is None:
            found = ", ".join(name.removesuffix(suffix) for name in folder.files() if name.endswith(suffix)) or "none"
            raise FileNotFoundError(f"split {split!r}: no file {path}; splits that exist: {found}")
        ids = [line.split()[0] for line in read_lines(path)]
        repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
        strange = [image_id for image_id in ids if not re.fullmatch(r"[\w.\-]+", image_id)]
        if not ids or repeated or strange:
            problem = f"repeats {repeated[:3]}" if repeated else f"has ids {strange[:3]}" if ids else "is empty"
            raise ValueError(f"{path}: expected one image id a line, each once; it {problem}")
        return sorted(ids)

    def known_ids(self) -> set[str]:
        """The ids of every image in the devkit, whatever its split."""
        return _stems(self.root / "JPEGImages", ".jpg")

    def has_ground_truth(self, image_ids: list[str]) -> bool:
        """Whether any of these images has a mask; if one has, all are expected to."""
        folders = (self.root / "SegmentationClass", self.root / "SegmentationObject")
        return any(not _stems(folder, ".png").isdisjoint(image_ids) for folder in folders)

    def read_image(self, image_id: str) -> tuple[bytes, np.ndarray]:
        """The file's bytes and its (H, W, 3) uint8 RGB pixels.

        Raises:
            CorruptItemError: If the file is missing, damaged, or neither JPEG nor PNG.
        """
        path, _, _ = self.files(image_id)
        with blame(image_id, self.name(path)):
            content = path.read_bytes()
            return content, np.asarray(decode_image(content).convert("RGB"))

    def read_masks(
        self, image_id: str, size: tuple[int, int], num_labels: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ground truth of an image of `size` (height, width).

        Returns:
            semantic (H, W) uint8, 255 void; instances (H, W) int32, 0 background, 1..G, -1 void; instance_labels (G,)
            int64, the class under each instance (0 where the id has no pixel).

        Raises:
            CorruptItemError: If a mask is missing, damaged, of another size, or has a class that does not exist.
        """
        _, class_path, object_path = self.files(image_id)
        with blame(image_id, self.name(class_path)):
            semantic = _read_palette(class_path, size)
            unknown = [int(c) for c in np.unique(semantic) if num_labels <= c != IGNORE_LABEL]
            if unknown:
                raise ValueError(f"expected classes 0..{num_labels - 1} and 255, got {unknown}")
        with blame(image_id, self.name(object_path)):
            instances = _read_palette(object_path, size).astype(np.int32)
            instances[instances == IGNORE_LABEL] = VOID
            return semantic, instances, instance_classes(semantic, instances)

    def files(self, image_id: str) -> tuple[StoragePath, StoragePath, StoragePath]:
        """Image, class mask, object mask, whether they exist or not."""
        return (
            self.root / "JPEGImages" / f"{image_id}.jpg",
            self.root / "SegmentationClass" / f"{image_id}.png",
            self.root / "SegmentationObject" / f"{image_id}.png",
        )

    def name(self, path: StoragePath) -> str:
        """A file of the devkit relative to its folder."""
        return f"{path.parent.name}/{path.name}"


def _stems(folder: StoragePath, suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in folder.files() if name.endswith(suffix)}


def open_devkit(path: Place) -> VocDevkit:
    """The devkit at `path`, which is VOC2012 itself or a folder with exactly one VOCyyyy.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several to choose from.
    """
    root = StoragePath.of(path)
    if not root.is_folder():
        raise FileNotFoundError(f"devkit {path}: no such folder")
    if (root / "JPEGImages").is_folder():
        return VocDevkit(_complete(root))
    found = [root / name for name in root.folders() if name.startswith("VOC")]
    if len(found) > 1:
        raise ValueError(f"devkit {path}: name one of {', '.join(str(folder) for folder in found)}")
    if not found:
        raise FileNotFoundError(f"devkit {path}: expected JPEGImages/ or one VOCyyyy/ in it, found neither")
    return VocDevkit(_complete(found[0]))


def _complete(root: StoragePath) -> StoragePath:
    for name in ("JPEGImages", "ImageSets/Segmentation"):
        if not (root / name).is_folder():
            raise FileNotFoundError(f"devkit {root}: expected the folder {name}/ in it, which is missing")
    return root


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


def decode_image(content: bytes) -> Image.Image:
    """Decode JPEG or PNG bytes, nothing else, in the file's own mode.

    Raises:
        ValueError: If the content is damaged, of another format, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(content), formats=("JPEG", "PNG")).verify()  # a PNG's checksums, which load() skips
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
            image.load()
            return image
    except Image.UnidentifiedImageError:
        raise ValueError("neither a JPEG nor a PNG file") from None
    except (OSError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"damaged image: {error}") from None


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
