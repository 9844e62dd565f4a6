"""A COCO-format data set with classes of its own, through everything: prepared, trained on, evaluated."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from instseg.config import EvaluateConfig, ModelConfig, PrepareConfig, TrackingConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.scenes import CLASSES, Scene, draw_scene
from instseg.data.synthetic import imagine_detections, imagine_logits
from instseg.jobs.evaluate import evaluate
from instseg.jobs.prepare import prepare
from instseg.jobs.train import train
from instseg.models.network import InstanceNetwork

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]
SIZE, NUM_IMAGES = (64, 96), 4
CATEGORY_IDS = {name: 90 - 7 * label for label, name in enumerate(CLASSES, 1)}  # neither from 1, nor rising
CHOSEN = ("donut", "ball", "leaf")  # three of five, in an order of their own
LABELS = np.array([0, *(CHOSEN.index(name) + 1 if name in CHOSEN else 0 for name in CLASSES)])  # by those of a scene


def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng([3, index]), *SIZE) for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """instances.json with five categories, photographs, detections of all five, logits of three classes."""
    root = tmp_path_factory.mktemp("coco")
    (root / "logits").mkdir()
    images, annotations, detections = [], [], []
    for index, scene in enumerate(scenes()):
        rng = np.random.default_rng(index)
        Image.fromarray(scene.image).save(root / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": SIZE[0], "width": SIZE[1]})
        for instance, label in enumerate(scene.labels, 1):
            rle: Any = coco_mask.encode(np.asfortranarray(scene.instances == instance, np.uint8))
            segmentation = {"size": list(SIZE), "counts": rle["counts"].decode()}
            about = {"id": len(annotations), "image_id": index, "category_id": CATEGORY_IDS[CLASSES[label - 1]]}
            annotations.append(about | {"segmentation": segmentation, "iscrowd": 0})
        for entry in imagine_detections(rng, scene):
            name = CLASSES[entry["category_id"] - 1]
            detections.append(entry | {"image_id": index, "category_id": CATEGORY_IDS[name]})
        logits = imagine_logits(rng, scene)[[0, *(CLASSES.index(name) + 1 for name in CHOSEN)]]
        np.savez_compressed(root / f"logits/{index}.npz", logits=logits)
    categories = [{"id": id_, "name": name} for name, id_ in CATEGORY_IDS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    (root / "detections.json").write_text(json.dumps(detections))
    (root / "classes.txt").write_text("\n".join(CHOSEN))
    return root


def test_three_classes_of_coco_format_go_through_the_whole_system(root: Path, tmp_path: Path) -> None:
    data, run, report = (str(tmp_path / name) for name in ("data", "run", "report"))
    names = {"coco": "instances.json", "images": "", "classes": "classes.txt", "detections": "detections.json"}
    inputs: dict[str, Any] = {option: str(root / name) for option, name in (names | {"logits": "logits"}).items()}
    prepare(PrepareConfig(data, **inputs))
    dataset = PreparedDataset(data)
    assert dataset.classes == ("background", *CHOSEN)
    for sample, scene in zip((dataset[index] for index in range(len(dataset))), scenes(), strict=True):
        np.testing.assert_array_equal(sample.semantic, LABELS[scene.semantic])
        kept = LABELS[scene.labels]
        assert sample.instance_labels is not None
        assert sample.instance_labels.tolist() == kept[kept > 0].tolist()
        assert set(sample.detections.labels) <= {1, 2, 3}

    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    model = ModelConfig(detection_head=True)
    train(TrainConfig(data, run, model, num_epochs=2, num_head_epochs=1, num_workers=1, tracking=tracking))
    assert InstanceNetwork.load(run).num_labels == 4
    evaluation = evaluate(EvaluateConfig(data, report, run, tracking=tracking, num_gallery=1))

    present = [sum((LABELS[scene.labels] == label).sum() for scene in scenes()) for label in (1, 2, 3)]
    for scores in evaluation.ap_r.values():
        assert scores.num_truths.tolist() == present
        assert scores.values.shape[1] == 3
    assert evaluation.confusion_after.shape == (4, 4)
    assert evaluation.confusion_after.sum() == NUM_IMAGES * SIZE[0] * SIZE[1]
    assert evaluation.ap_r["sds"].mean(0.5) > 0.2  # so that boxes, foregrounds and classes belong together
    with (tmp_path / "report" / "per_class.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(dataset.classes)
