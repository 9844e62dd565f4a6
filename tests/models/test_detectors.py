from __future__ import annotations

import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights

from instseg.data.voc import VOC_CLASSES
from instseg.models.detectors import Detector
from instseg.structures import Detections

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
NAMES = [
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
]
VOC = ("background", *VOC_CLASSES)
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
# In the order of VOC's classes.
IDS_OF_VOC = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]


def donor(num_outputs: int, name: str = SMALL) -> nn.Module:
    """A network of torchvision whose every tensor is random, batch statistics included."""
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, num_classes=num_outputs)
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_var", "running_mean")):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of a network with COCO's categories."""
    path = tmp_path_factory.mktemp("weights") / "coco.safetensors"
    save_file(donor(91).state_dict(), path)
    return path


Answering = Callable[[Detector, list[tuple[int, float, list[float]]]], Detector]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Answering:
    """A detector whose network gives these outputs: number, score and box of each."""

    def build(detector: Detector, outputs: list[tuple[int, float, list[float]]]) -> Detector:
        answer = {
            "labels": torch.tensor([label for label, _, _ in outputs], dtype=torch.int64),
            "scores": torch.tensor([score for _, score, _ in outputs], dtype=torch.float32),
            "boxes": torch.tensor([box for _, _, box in outputs], dtype=torch.float32).reshape(-1, 4),
        }
        monkeypatch.setattr(detector.model, "forward", lambda images: [answer for _ in images])
        return detector

    return build


def rows(detections: Detections) -> list[tuple[int, float, list[float]]]:
    triples = zip(detections.labels, detections.scores, detections.boxes, strict=True)
    return [(int(label), round(float(score), 4), box.tolist()) for label, score, box in triples]


def cells(num: int) -> list[str]:
    return ["background", *(f"cell {k}" for k in range(1, num + 1))]


def test_a_random_network_detects_inside_the_image_and_repeats_itself() -> None:
    torch.manual_seed(0)
    detector = Detector(SMALL, cells(3), min_score=0.0)
    detections = detector(IMAGE)
    assert len(detections) > 10
    detections.check_image(40, 60, 4)
    assert detections.foregrounds is None
    assert (np.diff(detections.scores) <= 0).all()
    assert rows(detector(IMAGE)) == rows(detections)
    assert rows(detector(np.ascontiguousarray(IMAGE[:, ::-1])[:, ::-1])) == rows(detections)  # negative strides


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (639, 1)])
def test_images_of_extreme_shapes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    detections = Detector(SMALL, cells(1), min_score=0.0)(np.full((*shape, 3), 90, np.uint8))
    assert len(detections) > 0
    detections.check_image(*shape, 2)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.zeros((4, 4, 3), np.float32), "dtype uint8"),
        (np.zeros((4, 4), np.uint8), r"shape \(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "H, W >= 1"),
        (np.zeros((1, 640, 3), np.uint8), "sides of a ratio below 640.* got 1x640"),
    ],
)
def test_other_images_are_refused(image: np.ndarray, expected: str) -> None:
    with pytest.raises(ValueError, match=f"image: expected .*{expected}"):
        Detector(SMALL, cells(1))(image)


def test_coco_categories_become_the_voc_classes(coco: Path, answering: Answering) -> None:
    detector = Detector(SMALL, VOC, coco)
    outputs = [(number, 0.9, [0.0, 0.0, 9.0, 9.0]) for number in range(1, 91)]
    assert sorted(answering(detector, outputs)(IMAGE).labels) == list(range(1, 21))
    for label, number in enumerate(IDS_OF_VOC, 1):
        assert answering(detector, [(number, 0.9, [0.0, 0.0, 9.0, 9.0])])(IMAGE).labels.tolist() == [label]


def test_each_class_of_coco_is_its_own_category(coco: Path, answering: Answering) -> None:
    categories = get_model_weights(SMALL)["DEFAULT"].meta["categories"]
    numbers = [number for number, name in enumerate(categories) if name not in ("__background__", "N/A")]
    assert len(numbers) == 80
    classes = ["background", *(categories[number] for number in numbers)]
    outputs = [(number, 1 - number / 100, [0.0, 0.0, 9.0, 9.0]) for number in range(1, 91)]
    detections = answering(Detector(SMALL, classes, coco), outputs)(IMAGE)
    assert detections.labels.tolist() == list(range(1, 81))
    np.testing.assert_allclose(detections.scores, [1 - number / 100 for number in numbers], rtol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_head_of_the_classes_has_them_in_order(tmp_path: Path, answering: Answering, num_classes: int) -> None:
    save_file(donor(num_classes + 1).state_dict(), tmp_path / "own.safetensors")
    detector = Detector(SMALL, cells(num_classes), tmp_path / "own.safetensors")
    outputs = [(k, 0.9 - k / 10, [10.0 * k, 0.0, 10.0 * k + 9, 9.0]) for k in range(1, num_classes + 1)]
    assert rows(answering(detector, outputs)(IMAGE)) == [(k, round(s, 4), box) for k, s, box in outputs]


def test_of_overlapping_boxes_of_a_class_the_best_stays(coco: Path, answering: Answering) -> None:
    """A over B at IoU 6/14 = 0.43, B over C at 0.43, A over C at 2/18 = 0.11; another class's box is untouched."""
    a, b, c = ([x, 0.0, x + 10.0, 10.0] for x in (0.0, 4.0, 8.0))
    outputs = [(18, 0.7, b), (17, 0.8, a), (18, 0.9, a), (18, 0.6, c)]  # dogs, and a cat
    dogs_and_cat = answering(Detector(SMALL, VOC, coco, nms_iou=0.3), outputs)(IMAGE)
    assert rows(dogs_and_cat) == [(12, 0.9, a), (8, 0.8, a), (12, 0.6, c)]  # B is gone, so it does not remove C
    all_of_them = answering(Detector(SMALL, VOC, coco, nms_iou=0.43), outputs)(IMAGE)
    assert [score for _, score, _ in rows(all_of_them)] == [0.9, 0.8, 0.7, 0.6]


def test_two_categories_of_one_class_compete(coco: Path, answering: Answering) -> None:
    box = [0.0, 0.0, 9.0, 9.0]
    outputs = [(1, 0.6, box), (63, 0.9, box), (63, 0.5, [20.0, 0.0, 29.0, 9.0])]
    detections = answering(Detector(SMALL, ["background", "sofa"], coco), outputs)(IMAGE)
    assert rows(detections) == [(1, 0.9, box), (1, 0.5, [20.0, 0.0, 29.0, 9.0])]


def test_boxes_are_clipped_and_what_is_empty_or_unsure_goes(coco: Path, answering: Answering) -> None:
    outputs = [
        (1, 0.9, [-5.0, 3.0, 70.0, 41.0]),
        (1, 0.05, [1.0, 1.0, 2.0, 2.0]),  # as much as is asked for
        (1, 0.049, [4.0, 1.0, 5.0, 2.0]),
        (2, 0.9, [60.5, 0.0, 70.0, 9.0]),  # right of the image
        (2, 0.9, [3.0, 7.0, 9.0, 7.0]),
        (2, 0.9, [3.0, float("nan"), 9.0, 9.0]),
        (2, float("nan"), [3.0, 7.0, 9.0, 9.0]),
    ]
    detections = answering(Detector(SMALL, VOC, coco), outputs)(IMAGE)
    assert rows(detections) == [(15, 0.9, [0.0, 3.0, 60.0, 40.0]), (15, 0.05, [1.0, 1.0, 2.0, 2.0])]


def test_no_output_is_no_detection(coco: Path, answering: Answering) -> None:
    for outputs in ([], [(13, 0.9, [0.0, 0.0, 9.0, 9.0])]):  # nothing, and a stop sign
        detections = answering(Detector(SMALL, VOC, coco), outputs)(IMAGE)
        assert len(detections) == 0
        assert detections.boxes.shape == (0, 4)


def test_the_order_of_the_classes_does_not_matter(coco: Path) -> None:
    turned = ("background", *VOC_CLASSES[::-1])
    one, two = (Detector(SMALL, classes, coco, min_score=0.001)(IMAGE) for classes in (VOC, turned))
    assert len(one) > 20
    assert len({*one.labels}) > 1
    names = [
        {(classes[label], score, *box) for label, score, box in rows(found)}
        for classes, found in ((VOC, one), (turned, two))
    ]
    assert names[0] == names[1]


def test_nothing_is_cut_before_the_categories_are_classes(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """312 cars at 0.02 side by side, and three dogs: B over C at IoU 0.43, A over B at 0.67, A over C at 0.25.

    torchvision's own cuts leave 100 detections, none below 0.05, and of the dogs B, which removed A.
    """
    dogs = [[x, 0.0, x + 100.0, 40.0] for x in (0.0, 40.0, 60.0)]  # C, B and A, on the image at eight times its size
    cars = [[x, y, x + 20.0, y + 20.0] for x in np.arange(0.0, 480.0, 20.0) for y in np.arange(60.0, 320.0, 20.0)]
    probabilities = torch.full((len(dogs) + len(cars), 91), 1e-6)
    probabilities[:3, 18] = torch.tensor([0.9, 0.8, 0.7])
    probabilities[3:, 3] = 0.02
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(1)
    detector = Detector(SMALL, VOC, coco, nms_iou=0.3, min_score=0.01)
    predictor = detector.model.get_submodule("roi_heads.box_predictor")
    monkeypatch.setattr(
        detector.model.get_submodule("rpn"),
        "forward",
        lambda *_: ([torch.tensor(dogs + cars, dtype=torch.float32)], {}),
    )
    monkeypatch.setattr(predictor, "forward", lambda _: (probabilities.log(), torch.zeros(len(probabilities), 4 * 91)))
    found = rows(detector(IMAGE))
    assert found[:2] == [(12, 0.9, [x / 8 for x in dogs[0]]), (12, 0.7, [x / 8 for x in dogs[2]])]
    assert sorted(found[2:]) == sorted((7, 0.02, [x / 8 for x in car]) for car in cars)


@pytest.mark.parametrize("name", NAMES)
def test_weights_by_name_make_torchvisions_own_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Batch normalisation's constants included, which are not among the weights."""
    weights = get_model_weights(name)["DEFAULT"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(donor(91, name).state_dict(), tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    peer = get_model(name, weights=weights).eval()
    detector = Detector(name, VOC, "default")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        got, expected = (network.get_submodule("backbone")(image) for network in (detector.model, peer))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert epsilons(detector.model) == epsilons(peer)
    for key, tensor in peer.state_dict().items():
        torch.testing.assert_close(detector.model.state_dict()[key], tensor, rtol=0, atol=0)


def epsilons(network: nn.Module) -> dict[str, float]:
    return {name: module.eps for name, module in network.named_modules() if hasattr(module, "eps")}  # pyright: ignore


def test_a_local_state_dict_gives_what_torchvision_gives(tmp_path: Path) -> None:
    model = donor(4)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    found = Detector(SMALL, cells(3), tmp_path / "own.pth", nms_iou=0.5)(IMAGE)
    model.get_submodule("roi_heads").detections_per_img = 10_000  # pyright: ignore
    with torch.no_grad():
        peer = model([torch.from_numpy(IMAGE).permute(2, 0, 1) / 255])[0]
    assert len(found) > 100
    assert found.labels.tolist() == peer["labels"].tolist()
    np.testing.assert_allclose(found.scores, peer["scores"])
    np.testing.assert_allclose(found.boxes, peer["boxes"], atol=1e-5)


def test_names_as_older_versions_of_torchvision_wrote_them(tmp_path: Path) -> None:
    def older(key: str) -> str:
        parts = key.split(".")
        return key.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if parts[1] == "fpn" else key

    tensors = donor(4).state_dict()
    renamed = {older(key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "old.safetensors")
    loaded = Detector(SMALL, cells(3), tmp_path / "old.safetensors").model.state_dict()
    torch.testing.assert_close(dict(loaded), dict(tensors), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [cells(3), VOC])
def test_another_number_of_outputs_is_refused(tmp_path: Path, classes: Sequence[str]) -> None:
    save_file(donor(7).state_dict(), tmp_path / "seven.safetensors")
    expected = f"weights: expected a detector of 91 outputs .* or of {len(classes)} .*, got 7"
    with pytest.raises(ValueError, match=expected):
        Detector(SMALL, classes, tmp_path / "seven.safetensors")


def test_classes_that_coco_does_not_have_are_refused(coco: Path) -> None:
    with pytest.raises(ValueError, match=r"classes: expected some of COCO's categories, .*'cell 1'"):
        Detector(SMALL, cells(2), coco)


def test_weights_of_another_network_are_refused(tmp_path: Path, coco: Path) -> None:
    expected = r"weights .*coco.safetensors: do not fit fasterrcnn_resnet50_fpn: .*; \d+ differences in all"
    with pytest.raises(ValueError, match=expected):
        Detector("fasterrcnn_resnet50_fpn", VOC, coco)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match=r"do not fit .*: backbone.body.0.0.weight is missing"):
        Detector(SMALL, VOC, tmp_path / "vgg.safetensors")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("fasterrcnn_resnet50", "fasterrcnn_resnet50_fpn"), ("retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn")],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown network '{name}'; did you mean '{nearest}'"):
        Detector(name, VOC)


def test_limits_are_in_the_unit_interval() -> None:
    with pytest.raises(ValueError, match="nms_iou"):
        Detector(SMALL, VOC, nms_iou=1.5)
    with pytest.raises(ValueError, match="min_score"):
        Detector(SMALL, VOC, min_score=-0.1)


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    file = "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth"
    place = f"could not download https://.*/{file} .*; put that file at {tmp_path}/hub/checkpoints/{file}"
    with pytest.raises(FileNotFoundError, match=place):
        Detector(SMALL, VOC, "default")
