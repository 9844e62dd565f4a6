"""The data directory's bytes against CPUs, paths, interruptions and corruption; all runs share one generated devkit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instseg.config import GrabCutConfig, InspectConfig, PrepareConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.quarantine import read_quarantine
from instseg.data.synthetic import write_synthetic_devkit
from instseg.data.voc import open_devkit
from instseg.jobs import sources
from instseg.jobs.prepare import prepare
from tests.jobs.conftest import deadly
from tests.jobs.ending import check_ending

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_IMAGES, SHARD_SIZE = 10, 4
pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_synthetic_devkit(str(root), NUM_IMAGES, 1, seed=7, size=(64, 96))
    return root


def _config(devkit: Path, out: Path, **fields: object) -> PrepareConfig:
    base = PrepareConfig(
        devkit=str(devkit),
        split="train",
        detections=str(devkit / "detections.json"),
        out=str(out),
        logits=str(devkit / "logits"),
        classes=str(devkit / "classes.txt"),
        shard_size=SHARD_SIZE,
    )
    return replace(base, **fields)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def prepared(devkit: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A complete data directory, made with two CPUs. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("prepared")
    prepare(_config(devkit, out))
    return out


def _content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def _times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.iterdir()}


def test_every_image_is_there_once(prepared: Path) -> None:
    dataset = PreparedDataset(str(prepared))
    assert len(dataset) == NUM_IMAGES
    assert dataset.image_ids == tuple(f"scene_{index:05d}" for index in range(NUM_IMAGES))
    assert [len(shard["image_ids"]) for shard in dataset.manifest["shards"]] == [4, 4, 2]
    samples = [dataset[index] for index in range(len(dataset))]
    assert tuple(sample.image_id for sample in samples) == dataset.image_ids
    assert sum(len(sample.detections) for sample in samples) == dataset.manifest["num_detections"] > NUM_IMAGES
    assert read_quarantine(prepared / "quarantine.parquet") == []
    for sample in samples:
        sample.detections.check_image(64, 96, dataset.num_labels)
        assert sample.logits is not None
        assert sample.logits.shape == (6, 8, 12)


def test_bytes_depend_on_neither_cpus_nor_paths(devkit: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(devkit, tmp_path / "elsewhere")
    script = (
        "import ray, sys, tyro; from instseg.config import PrepareConfig; from instseg.jobs.prepare import prepare\n"
        "ray.init(num_cpus=1, include_dashboard=False); prepare(tyro.cli(PrepareConfig))"
    )
    options = "--devkit . --split train --detections detections.json --logits logits --classes classes.txt --out ../one"
    command = [sys.executable, "-c", script, *options.split(), "--shard-size", str(SHARD_SIZE)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True, timeout=120)
    assert _content(tmp_path / "one") == _content(prepared)


def test_a_second_run_does_nothing_and_says_so(
    devkit: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _times(prepared)
    assert len(prepare(_config(devkit, prepared))) == NUM_IMAGES
    assert "nothing to do" in capsys.readouterr().out
    assert _times(prepared) == before


def test_the_end_shows_what_was_prepared_or_how_to_see_it(
    devkit: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(_config(devkit, prepared))
    places, following = check_ending(capsys.readouterr().out)
    assert places == [prepared]
    assert [(type(config), config.data) for config in following] == [
        (kind, str(prepared)) for kind in (InspectConfig, TrainConfig)
    ]
    prepare(_config(devkit, prepared, contact_sheet=str(tmp_path / "sheet")))
    sheet = tmp_path / "sheet" / "contact_sheet.png"
    assert check_ending(capsys.readouterr().out)[0][0] == sheet
    page = sheet.with_suffix(".html").read_text()
    assert [f"<h3>scene_{index:05d}</h3>" in page for index in range(NUM_IMAGES)] == [True] * NUM_IMAGES


def test_other_settings_need_another_directory(devkit: Path, prepared: Path, tmp_path: Path) -> None:
    before = _times(prepared)
    with pytest.raises(ValueError, match=r"grabcut\.num_iterations \(1 there, 2 now\); choose another --out"):
        prepare(_config(devkit, prepared, grabcut=GrabCutConfig(num_iterations=2)))
    detections = tmp_path / "detections.json"
    detections.write_text("[]")
    with pytest.raises(ValueError, match="detections "):
        prepare(_config(devkit, prepared, detections=str(detections)))
    shutil.copytree(devkit, tmp_path / "inputs")
    path = tmp_path / "inputs" / "logits" / "scene_00003.npz"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])  # of the same size
    with pytest.raises(ValueError, match=r"prepared with other settings: logits \(.* there, .* now\)"):
        prepare(_config(tmp_path / "inputs", prepared))
    assert _times(prepared) == before


def test_a_half_written_run_is_completed(
    devkit: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "manifest.json").unlink()
    _flip_a_bit(tmp_path / "shard-00001.parquet")
    (tmp_path / "shard-00002.parquet").unlink()
    (tmp_path / "shard-00002.parquet.tmp-123").write_bytes(b"of a killed worker")
    shutil.copy(tmp_path / "shard-00000.parquet", tmp_path / "shard-00007.parquet")  # of a run with smaller shards
    kept = _times(tmp_path)["shard-00000.parquet"]
    prepare(_config(devkit, tmp_path))
    assert "1 of 3 shards were there already" in capsys.readouterr().out
    assert _content(tmp_path) == _content(prepared)
    assert _times(tmp_path)["shard-00000.parquet"] == kept


def test_shards_of_other_settings_are_redone(devkit: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(_config(devkit, tmp_path, grabcut=GrabCutConfig(num_iterations=2)))
    (tmp_path / "manifest.json").unlink()
    prepare(_config(devkit, tmp_path))
    assert _content(tmp_path) == _content(prepared)


def _flip_a_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes([content[2000] ^ 8]) + content[2001:])


def test_a_damaged_complete_run_is_mended(
    devkit: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "shard-00000.parquet", tmp_path / "shard-00001.parquet")
    _flip_a_bit(tmp_path / "shard-00002.parquet")
    prepare(_config(devkit, tmp_path))
    printed = capsys.readouterr()
    assert "shard-00001.parquet is damaged" in printed.err
    assert "1 of 3 shards were there already" in printed.out
    assert _content(tmp_path) == _content(prepared)


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_out_may_not_be_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(ValueError, match=r"out .*: expected a folder .*, but .*/file is a file"):
        prepare(_config(tmp_path / "no devkit is looked for", file / below))
    assert file.read_text() == "kept"


def test_what_a_task_cannot_write_is_one_line(devkit: Path, tmp_path: Path) -> None:
    """As on a full disk, where OSError is raised in the same place."""
    (tmp_path / "shard-00001.parquet").mkdir()
    with pytest.raises(OSError, match=f"^.Errno 21. Is a directory: '{tmp_path}'$"):
        prepare(_config(devkit, tmp_path))


def test_a_killed_worker_is_replaced(
    devkit: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = tmp_path / "died"
    monkeypatch.setattr(sources, "open_devkit", lambda *args: deadly(open_devkit(*args), "scene_00004", died))
    prepare(_config(devkit, tmp_path / "out"))
    assert died.exists()
    assert _content(tmp_path / "out") == _content(prepared)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _shrink_mask(path: Path) -> None:
    from PIL import Image

    Image.new("L", (95, 64)).save(path)


def _array_alone(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((6, 8, 12), np.float16))


def _bad_detections(path: Path) -> None:
    entries = json.loads(path.read_text())
    first = next(index for index, entry in enumerate(entries) if entry["image_id"] == "scene_00004")
    entries[first]["category_id"] = 6
    entries.append(entries[first] | {"category_id": 1, "bbox": [95.9999999, 10, 1e-8, 20]})  # empty in float32
    entries.append(entries[0] | {"image_id": "scene_99999"})
    path.write_text(json.dumps(entries))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "JPEGImages/scene_00000.jpg": _truncate,
    "SegmentationObject/scene_00001.png": _shrink_mask,
    "logits/scene_00002.npz": _array_alone,
    "logits/scene_00003.npz": Path.unlink,
    "detections.json": _bad_detections,
}


@pytest.fixture
def damaged(devkit: Path, tmp_path: Path) -> Path:
    root = tmp_path / "damaged"
    shutil.copytree(devkit, root)
    for name, damage in DAMAGE.items():
        damage(root / name)
    return root


def test_corrupt_items_are_quarantined(
    damaged: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"7 bad items in 6 of 10 images .* more than --max-quarantined 0.01"
    ) as caught:
        prepare(_config(damaged, out))
    assert "scene_00000: JPEGImages/scene_00000.jpg: damaged image" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no manifest"):
        PreparedDataset(str(out))

    dataset = prepare(_config(damaged, out, max_quarantined=0.6))  # as many as allowed
    printed = capsys.readouterr()
    assert "3 of 3 shards were there already" in printed.out
    assert "warning: quarantined 7 bad items" in printed.err
    assert "JPEGImages/scene_00000.jpg" in printed.err
    rows = read_quarantine(out / "quarantine.parquet")
    assert [(row.image_id, row.file.split("[")[0]) for row in rows] == [
        ("scene_00000", "JPEGImages/scene_00000.jpg"),
        ("scene_00001", "SegmentationObject/scene_00001.png"),
        ("scene_00002", "logits/scene_00002.npz"),
        ("scene_00003", "logits/scene_00003.npz"),
        ("scene_00004", "detections.json"),
        ("scene_00004", "detections.json"),
        ("scene_99999", "detections.json"),
    ]
    reasons = (
        "damaged",
        "expected the image's 96x64",
        "not a zip file",
        "missing",
        r"1..5, got 6",
        "x0 < x1",
        "not in the data set",
    )
    for row, reason in zip(rows, reasons, strict=True):
        assert reason in row.reason
    whole = PreparedDataset(str(prepared))
    assert dataset.image_ids == whole.image_ids[4:]
    assert len(dataset[0].detections) == len(whole[4].detections) - 1
    np.testing.assert_array_equal(dataset[1].image, whole[5].image)

    with pytest.raises(ValueError, match=r"more than --max-quarantined 0\.01"):
        prepare(_config(damaged, out))  # the complete directory does not hide what is missing from it


def test_test_images_have_no_ground_truth(devkit: Path, tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    shutil.copytree(devkit, root)
    for folder in ("SegmentationClass", "SegmentationObject"):
        shutil.rmtree(root / folder)
    sample = prepare(_config(root, tmp_path / "out", split="val", logits=None))[0]
    assert (sample.semantic, sample.instances, sample.logits) == (None, None, None)
    assert len(sample.detections) > 0
