from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instseg.config import PrepareConfig
from instseg.data.manifest import collect_settings
from instseg.data.voc import open_devkit


@pytest.fixture
def inputs(devkit: Path, tmp_path: Path) -> Path:
    shutil.copytree(devkit, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _settings(inputs: Path) -> dict[str, Any]:
    listing = open_devkit(inputs, ("background", "a")).list_split("train")
    detections, logits = str(inputs / "detections.json"), str(inputs / "logits")
    config = PrepareConfig(devkit=str(inputs), split="train", detections=detections, out="out", logits=logits)
    return collect_settings(config, listing, {})


def _flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("JPEGImages/scene_00002.jpg", "images"),
        ("SegmentationClass/scene_00002.png", "images"),
        ("SegmentationObject/scene_00002.png", "images"),
        ("logits/scene_00002.npz", "logits"),
        ("detections.json", "detections"),
    ],
)
def test_settings_tell_other_content_of_the_same_size(inputs: Path, file: str, setting: str) -> None:
    content, before = (inputs / file).read_bytes(), _settings(inputs)
    (inputs / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = _settings(inputs)
    assert [name for name in before if before[name] != after[name]] == [setting]


def test_settings_tell_other_logits_of_the_same_size(inputs: Path) -> None:
    path = inputs / "logits" / "scene_00001.npz"
    with np.load(path) as arrays:
        logits = arrays["logits"]
    np.savez(path, logits=logits)
    size, before = path.stat().st_size, _settings(inputs)
    np.savez(path, logits=logits + np.float16(1))
    assert path.stat().st_size == size
    assert _settings(inputs)["logits"] != before["logits"]


def test_settings_are_those_of_the_content_alone(inputs: Path, devkit: Path) -> None:
    assert _settings(inputs) == _settings(devkit)
    path = inputs / "logits" / "scene_00001.npz"
    path.unlink()
    path.mkdir()  # its image's task will say that it cannot be read
    assert _settings(inputs)["logits"] != _settings(devkit)["logits"]
