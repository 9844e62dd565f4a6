"""Predictions against the method on each image, COCO's own reader, faults; all runs share one generated set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from instseg import InstanceNetwork, ModelConfig, segment_instances
from instseg.config import GrabCutConfig, PredictConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.foreground import compute_foregrounds
from instseg.data.images import decode_photograph
from instseg.data.network_outputs import import_detections, read_detections, read_logits
from instseg.data.quarantine import read_quarantine
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.predict import predict
from instseg.models.checkpoint import save_checkpoint
from instseg.models.detectors import Detector
from instseg.models.semantic import build_semantic
from tests.jobs.conftest import NUM_IMAGES, NUM_LABELS

NUM_PHOTOGRAPHS, SHARD_SIZE = 6, 2
BAD = "scene_00003"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster", "without_shape_checks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two sizes, the fourth corrupt, with detections, logits and class names."""
    root = tmp_path_factory.mktemp("photographs")
    write_synthetic_devkit(str(root / "a"), NUM_PHOTOGRAPHS, 0, seed=7, size=(64, 96))
    write_synthetic_devkit(str(root / "b"), 2, 0, seed=8, size=(80, 72))
    entries = json.loads((root / "a" / "detections.json").read_text())
    for image_id in ("scene_00000", "scene_00001"):
        shutil.copy(root / "b" / "JPEGImages" / f"{image_id}.jpg", root / "a" / "JPEGImages")
        shutil.copy(root / "b" / "logits" / f"{image_id}.npz", root / "a" / "logits")
        others = json.loads((root / "b" / "detections.json").read_text())
        entries = [entry for entry in entries if entry["image_id"] != image_id]
        entries += [entry for entry in others if entry["image_id"] == image_id]
    (root / "a" / "detections.json").write_text(json.dumps(entries))
    (root / "a" / "JPEGImages" / f"{BAD}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photograph")
    return root / "a"


def options(photographs: Path, out: Path, **fields: Any) -> PredictConfig:
    given = PredictConfig(
        out=str(out),
        images=str(photographs / "JPEGImages"),
        detections=str(photographs / "detections.json"),
        logits=str(photographs / "logits"),
        classes=str(photographs / "classes.txt"),
        panoptic=True,
        shard_size=SHARD_SIZE,
    )
    return replace(given, **fields)


@pytest.fixture(scope="module")
def predicted(photographs: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A complete output folder. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    predict(options(photographs, out))
    return out


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_masks_are_those_of_the_method_on_each_image(photographs: Path, predicted: Path) -> None:
    records, _ = read_detections(photographs / "detections.json")
    num_labels = 1 + len((photographs / "classes.txt").read_text().split())
    good = [path for path in sorted((photographs / "JPEGImages").iterdir()) if path.stem != BAD]
    assert sorted(path.stem for path in (predicted / "instances").iterdir()) == [path.stem for path in good]
    num_instances = 0
    for path in good:
        image = decode_photograph(path.read_bytes()).pixels
        labels = {label: label for label in range(1, num_labels)}
        found, _ = import_detections(path.stem, records.get(path.stem, []), image.shape[:2], labels, 0.05)
        found, _ = compute_foregrounds(image, found, path.stem, GrabCutConfig())
        logits = torch.from_numpy(read_logits(photographs / "logits", path.stem, num_labels)).float()
        expected = segment_instances(image, logits.softmax(0).numpy(), found)
        instances = read(predicted / "instances" / f"{path.stem}.png")
        assert instances.dtype == np.uint16
        np.testing.assert_array_equal(instances, expected.instances)
        np.testing.assert_array_equal(read(predicted / "semantic" / f"{path.stem}.png"), expected.semantic)
        num_instances += len(expected)
        with Image.open(predicted / "overlay" / f"{path.stem}.png") as overlay:
            assert overlay.size == image.shape[1::-1]
    assert num_instances == len(json.loads((predicted / "predictions.json").read_text())) > NUM_PHOTOGRAPHS


def test_coco_reads_the_results(predicted: Path) -> None:
    truth = COCO(str(predicted / "images.json"))
    results: Any = truth.loadRes(str(predicted / "predictions.json"))
    assert [category["id"] for category in truth.cats.values()] == list(range(1, len(truth.cats) + 1))
    for image in truth.imgs.values():
        instances = read(predicted / "instances" / Path(image["file_name"]).with_suffix(".png"))
        assert instances.shape == (image["height"], image["width"])
        annotations = results.imgToAnns[image["id"]]
        assert len(annotations) == instances.max()
        for k, annotation in enumerate(annotations, 1):
            np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), instances == k)
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()


def test_the_panoptic_format_says_the_same(predicted: Path) -> None:
    panoptic = json.loads((predicted / "panoptic.json").read_text())
    results: Any = COCO(str(predicted / "images.json")).loadRes(str(predicted / "predictions.json"))
    assert {category["id"] for category in panoptic["categories"]} == set(results.cats)
    assert len(panoptic["images"]) == len(panoptic["annotations"]) == NUM_PHOTOGRAPHS - 1
    for annotation in panoptic["annotations"]:
        red, green, blue = read(predicted / "panoptic" / annotation["file_name"]).astype(np.int64).transpose(2, 0, 1)
        ids = red + 256 * green + 256**2 * blue
        np.testing.assert_array_equal(ids, read(predicted / "instances" / annotation["file_name"]))
        of_image = results.imgToAnns[annotation["image_id"]]
        assert len(of_image) == len(annotation["segments_info"])
        for segment, result in zip(annotation["segments_info"], of_image, strict=True):
            assert segment["area"] == (ids == segment["id"]).sum() == coco_mask.area(result["segmentation"])
            assert segment["category_id"] == result["category_id"]


def test_a_corrupt_image_is_quarantined(predicted: Path) -> None:
    (row,) = read_quarantine(predicted / "quarantine.parquet")
    assert (row.image_id, row.file) == (BAD, f"{BAD}.jpg")
    assert "neither a JPEG nor a PNG" in row.reason or "damaged image" in row.reason


def test_the_same_command_does_what_is_missing(photographs: Path, predicted: Path, tmp_path: Path) -> None:
    """A lost PNG, a damaged one, and a photograph that is another now: their shards, and no other."""
    out, inputs = tmp_path / "out", tmp_path / "inputs"
    shutil.copytree(predicted, out)
    shutil.copytree(photographs, inputs)
    before = times(out)
    (out / "overlay" / "scene_00001.png").unlink()
    (out / "instances" / "scene_00000.png.tmp-0").touch()
    (inputs / "JPEGImages" / f"{BAD}.jpg").write_bytes((photographs / "JPEGImages" / "scene_00002.jpg").read_bytes())
    done = predict(options(inputs, out))
    assert (done.num_images, done.num_kept, done.quarantined) == (NUM_PHOTOGRAPHS, SHARD_SIZE, [])
    kept = [name for name, time in times(out).items() if before.get(name) == time]
    assert {Path(name).stem for name in kept if name.startswith("instances")} == {"scene_00004", "scene_00005"}
    others = ("predictions.json", "images.json", "panoptic.json", "summary.json", "quarantine.parquet")
    touched = {name for name, value in content(out).items() if content(predicted).get(name) != value}
    changed = {f"{folder}/{BAD}.png" for folder in ("instances", "semantic", "overlay", "panoptic")}
    shard = {"shards/shard-00001.json", "shards/shard-00001.parquet"}
    assert touched == {*others, *changed, *shard}
    images = json.loads((out / "images.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in images][3] == (4, f"{BAD}.jpg")
    assert [image["id"] for image in json.loads((predicted / "images.json").read_text())["images"]] == [1, 2, 3, 5, 6]


def test_other_settings_and_other_folders_are_refused(photographs: Path, predicted: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds predictions of other settings: min_score \(0.05 there, 0.5 now\); choose"
    ):
        predict(options(photographs, predicted, min_score=0.5))
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(
        ValueError, match=r"out .*: expected a new or empty folder, or one of predictions, got \['holiday"
    ):
        predict(options(photographs, tmp_path))


def test_images_that_cannot_be_used_fail_where_they_are_too_many(photographs: Path, tmp_path: Path) -> None:
    bad = photographs / "JPEGImages" / f"{BAD}.jpg"
    with pytest.raises(ValueError, match=r"1 bad items in 1 of 1 images .*, more than --max-quarantined 0.5"):
        predict(options(photographs, tmp_path / "out", images=str(bad)))


def test_detections_of_other_images_alone_are_a_mistake(photographs: Path, tmp_path: Path) -> None:
    shutil.copy(photographs / "JPEGImages" / "scene_00000.jpg", tmp_path / "holiday.jpg")
    with pytest.raises(
        ValueError, match=r"detections .*: are of none of the images, but of 'scene_00000', ...; .* 'holiday'"
    ):
        predict(options(photographs, tmp_path / "out", images=str(tmp_path / "holiday.jpg")))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., str]:
    """Writes a checkpoint of an untrained network for the tiny images."""

    def write(name: str, **fields: Any) -> str:
        torch.manual_seed(0)
        model = ModelConfig(**fields)
        classes = ["background", "square", "circle", "cross"]
        config = {"model": asdict(model), "num_labels": NUM_LABELS, "classes": classes}
        save_checkpoint(tmp_path / name, InstanceNetwork(model, NUM_LABELS).state_dict(), config)
        return str(tmp_path / name)

    return write


def test_a_prepared_set_with_a_detection_head(tiny_data: Path, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    run = checkpoint("run", detection_head=True)
    done = predict(PredictConfig(str(tmp_path / "out"), data=str(tiny_data), checkpoint=run, overlays=False))
    assert (done.num_images, done.quarantined) == (NUM_IMAGES, [])
    dataset, network = PreparedDataset(tiny_data), InstanceNetwork.load(run)
    for index in range(len(dataset)):
        sample = dataset[index]
        expected = network.segment(sample.image, sample.detections, sample.logits)
        np.testing.assert_array_equal(read(tmp_path / f"out/instances/{sample.image_id}.png"), expected.instances)
    assert not (tmp_path / "out" / "overlay").exists()


def test_networks_that_run_here(photographs: Path, tmp_path: Path) -> None:
    """From files, as the pretrained ones come; the photograph is upright where its EXIF says how."""
    torch.manual_seed(0)
    names = {"detector": "fasterrcnn_mobilenet_v3_large_320_fpn", "semantic": "lraspp_mobilenet_v3_large"}
    classes = ("background", *(photographs / "classes.txt").read_text().split())
    detector, semantic = Detector(names["detector"], classes), build_semantic(names["semantic"], len(classes))
    assert semantic is not None
    torch.save(detector.model.state_dict(), tmp_path / "detector.pth")
    torch.save(semantic.body.model.state_dict(), tmp_path / "semantic.pth")  # pyright: ignore
    with Image.open(photographs / "JPEGImages" / "scene_00000.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif)
        width, height = image.size
    config = PredictConfig(
        str(tmp_path / "out"),
        images=str(tmp_path / "turned.jpg"),
        recipe="pretrained",
        detector=names["detector"],
        semantic=names["semantic"],
        detector_weights=str(tmp_path / "detector.pth"),
        semantic_weights=str(tmp_path / "semantic.pth"),
        classes=str(photographs / "classes.txt"),
        min_score=0.0,
    )
    assert predict(config).num_images == 1
    assert read(tmp_path / "out" / "instances" / "turned.png").shape == (width, height)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "data"}, "photographs: expected --images or --data, got both"),
        ({"detections": None}, "detections: expected --detections FILE, --detector fasterrcnn_resnet50_fpn, ..., got"),
        ({"logits": None}, "logits: expected --logits FOLDER, --semantic deeplabv3_resnet50, ..., got neither"),
        ({"recipe": "pretrained", "checkpoint": "run"}, "recipe: expected none beside --checkpoint, got pretrained"),
        ({"images": None, "data": "data"}, "detections: expected none with --data, which has been prepared, got"),
    ],
)
def test_options_that_contradict_each_other_are_named(photographs, tmp_path, fields, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        options(photographs, tmp_path, **fields)


def test_logits_are_asked_for_once(
    photographs: Path, tiny_data: Path, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    run, own = checkpoint("run"), checkpoint("own", semantic="lraspp_mobilenet_v3_large")
    images = PredictConfig(str(tmp_path / "out"), images=str(photographs), detector="x", checkpoint=run)
    with pytest.raises(
        ValueError, match="logits: expected --logits FOLDER or --semantic NAME, as there is no semantic"
    ):
        predict(images)
    with pytest.raises(ValueError, match=f"semantic: expected none beside {own}, which has its own, got fcn_resnet50"):
        predict(replace(images, checkpoint=own, semantic="fcn_resnet50"))
    with pytest.raises(ValueError, match="has 4 labels, the data has"):
        predict(replace(images, classes=str(photographs / "classes.txt"), semantic="fcn_resnet50"))
