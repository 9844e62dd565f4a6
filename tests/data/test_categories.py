from __future__ import annotations

from instseg.data.categories import VOC_OF_COCO, match_classes
from instseg.data.voc import VOC_CLASSES

# As in COCO's instances files.
IDS = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)]
NAMES = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]  # fmt: skip
COCO = dict(zip(IDS, NAMES, strict=True))
# In the order of VOC's classes.
IDS_OF_VOC = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]


def test_the_ids_of_the_voc_classes_are_the_known_ones() -> None:
    labels = match_classes(COCO, ("background", *VOC_CLASSES))
    assert {id_: label for id_, label in labels.items() if label} == {id_: k for k, id_ in enumerate(IDS_OF_VOC, 1)}
    assert labels.keys() == COCO.keys()


def test_categories_match_themselves() -> None:
    labels = match_classes(COCO, ("background", *COCO.values()))
    assert list(labels.values()) == list(range(1, 81))


def test_voc_categories_match_the_classes_of_coco() -> None:
    voc = dict(enumerate(VOC_CLASSES, 1))
    classes = ("background", *COCO.values())
    coco_of_voc = {new: old for old, new in VOC_OF_COCO.items()}
    labels = match_classes(voc, classes)
    assert [classes[label] for label in labels.values()] == [coco_of_voc.get(name, name) for name in VOC_CLASSES]


def test_the_name_itself_goes_before_its_synonym() -> None:
    assert match_classes({1: "couch", 2: "sofa"}, ("background", "sofa", "couch")) == {1: 2, 2: 1}
    assert match_classes({1: "couch", 2: "sofa"}, ("background", "sofa")) == {1: 1, 2: 1}


def test_what_is_no_class_is_background() -> None:
    assert match_classes({7: "cell", 9: "background"}, ("background", "nucleus")) == {7: 0, 9: 0}
    assert match_classes({}, ("background", "nucleus")) == {}
