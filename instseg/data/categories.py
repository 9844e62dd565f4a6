"""Which of a data set's classes a category of COCO is, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What VOC calls otherwise; all other names that both have are the same.
VOC_OF_COCO = {
    "airplane": "aeroplane",
    "motorcycle": "motorbike",
    "dining table": "diningtable",
    "potted plant": "pottedplant",
    "couch": "sofa",
    "tv": "tvmonitor",
}


def match_classes(category_names: Mapping[int, str], classes: Sequence[str]) -> dict[int, int]:
    """The label of each category: that of the class of its name, else of its name in VOC's or COCO's words.

    Args:
        category_names: Of each category id, as in a COCO file's `categories`.
        classes: Names of the labels 0..K; 0 is the background and matches nothing.

    Returns:
        The label 1..K of each id, 0 where it is none of the classes.
    """
    labels = {name: label for label, name in enumerate(classes) if label > 0}
    same = {_in_voc(name): label for name, label in labels.items()}
    return {id_: labels.get(name, same.get(_in_voc(name), 0)) for id_, name in category_names.items()}


def _in_voc(name: str) -> str:
    return VOC_OF_COCO.get(name, name)
