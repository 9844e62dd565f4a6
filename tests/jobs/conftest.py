from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instseg.data.files import sha256_of, write_json
from instseg.data.images import ImageFile
from instseg.data.schema import FORMAT_VERSION, SCHEMA, encode_row
from instseg.data.source import Item
from instseg.data.voc import VocDevkit
from instseg.structures import Detections, Sample

# Time that tests would wait for: the controller's polling, an actor that watches for nodes to be reclaimed.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"

NUM_LABELS, HEIGHT, WIDTH = 4, 24, 32
NUM_IMAGES = 7  # odd, so that two workers cannot share them evenly


def make_sample(index: int) -> Sample:
    """Two squares on a background; every third image has no detection, the last one is void everywhere."""
    rng = np.random.default_rng(index)
    instances = np.zeros((HEIGHT, WIDTH), np.int32)
    instances[4:14, 3:13] = 1
    instances[8:20, 16:28] = 2
    labels = rng.integers(1, NUM_LABELS, 2)
    semantic = np.concatenate([[0], labels]).astype(np.uint8)[instances]
    logits = 0.3 * np.eye(NUM_LABELS)[semantic].transpose(2, 0, 1) + rng.normal(size=(NUM_LABELS, HEIGHT, WIDTH))
    boxes = np.array([[2, 4, 14, 15], [15, 7, 28, 21]], np.float32)
    detections = Detections(labels, np.array([0.9, 0.6], np.float32), boxes, instances == np.array([[[1]], [[2]]]))
    if index % 3 == 0:
        detections = Detections.empty(HEIGHT, WIDTH)
    if index == NUM_IMAGES - 1:
        semantic, instances = np.full_like(semantic, 255), np.full_like(instances, -1)
    return Sample(
        image_id=f"image_{index}",
        image=np.clip(80 * semantic[..., None] + rng.integers(0, 60, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8),
        detections=detections,
        semantic=semantic,
        instances=instances,
        instance_labels=labels,
        logits=logits.astype(np.float16),
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of a few tiny images, as prepare writes it."""
    return _write_data(tmp_path_factory.mktemp("data"), range(NUM_IMAGES))


@pytest.fixture(scope="session")
def write_data() -> Callable[[Path, Iterable[int]], Path]:
    """Writes a data directory of some of the tiny images into a folder."""
    return _write_data


def _write_data(root: Path, indices: Iterable[int]) -> Path:
    samples = [make_sample(index) for index in indices]
    rows = []
    for sample in samples:
        png = encode_png(sample.image)
        rows.append(encode_row(sample, png, ["grabcut"] * len(sample.detections), "test"))
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), root / "shard.parquet", row_group_size=1)
    shard = {
        "file": "shard.parquet",
        "num_bytes": (root / "shard.parquet").stat().st_size,
        "sha256": sha256_of(root / "shard.parquet"),
        "image_ids": [sample.image_id for sample in samples],
    }
    classes = ["background", "square", "circle", "cross"]
    manifest = {"classes": classes, "shards": [shard], "versions": {"format": FORMAT_VERSION}}
    write_json(root / "manifest.json", manifest)
    return root


def encode_png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def deadly(devkit: VocDevkit, fatal: str, died: Path) -> VocDevkit:
    """The devkit, but the first process that reads this image is killed; a file says that it was."""

    class Deadly(VocDevkit):  # in a function, so that Ray sends it to its workers with its code
        def read_image(self, item: Item) -> ImageFile:
            if item.image_id == fatal and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read_image(item)

    return Deadly(devkit.root, devkit.classes)
