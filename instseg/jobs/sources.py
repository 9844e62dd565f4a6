"""Which data set the options of prepare mean."""

from __future__ import annotations

from instseg.config import PrepareConfig
from instseg.data.source import Listing, read_lines
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES, open_devkit
from instseg.storage import Place, StoragePath


def list_images(config: PrepareConfig) -> Listing:
    """The images that the options name, and what reads them.

    Raises:
        FileNotFoundError: If a root, or a split, is missing.
        ValueError: If one is malformed as a whole.
    """
    named = None if config.classes is None else read_classes(config.classes)
    if config.coco is not None and config.images is not None:
        from instseg.data.coco import list_coco

        return list_coco(config.coco, config.images, named, config.min_pixels)
    classes = (BACKGROUND_NAME, *(named or VOC_CLASSES))
    if config.images is not None:
        from instseg.data.folder import list_folder

        return list_folder(config.images, classes)
    devkit = None if config.devkit is None else open_devkit(config.devkit, classes)
    assert config.split is not None  # for type checkers: `PrepareConfig` requires it here
    if config.sbd is not None:
        from instseg.data.sbd import list_sbd

        return list_sbd(config.sbd, config.split, devkit)
    assert devkit is not None  # likewise
    return devkit.list_split(config.split)


def read_classes(place: Place) -> tuple[str, ...]:
    """Foreground class names: those of VOC for "voc", else of a text file, one a line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8, is empty, repeats a name, or names the background.
    """
    if place == "voc":
        return VOC_CLASSES
    try:
        names = read_lines(StoragePath.of(place))
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"classes {place}: no such file") from None
    if not names or len(set(names)) < len(names) or BACKGROUND_NAME in names:
        raise ValueError(f"classes {place}: expected distinct foreground class names, one a line, got {names}")
    return tuple(names)
