"""The README's commands and snippets, run as written on a generated data set with the 20 classes of VOC."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instseg.data.synthetic import write_synthetic_devkit

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder in which the README's relative paths exist."""
    write_synthetic_devkit(str(tmp_path / "VOCdevkit"), num_train=4, num_val=3, seed=0, size=(32, 48))
    for file in sorted((tmp_path / "VOCdevkit" / "logits").iterdir()):
        with np.load(file) as arrays:
            logits = arrays["logits"]
        absent = np.full((21 - len(logits), *logits.shape[1:]), -20, np.float16)
        np.savez(file, logits=np.concatenate([logits, absent]))
    for name in ("logits", "detections.json"):
        (tmp_path / name).symlink_to(tmp_path / "VOCdevkit" / name)
    (tmp_path / "workflows").symlink_to(REPOSITORY / "workflows")
    return tmp_path


def test_the_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.ray
def test_the_four_commands(workplace):
    (commands,) = [block for block in blocks("sh") if "workflows/prepare.py" in block]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = commands.replace("--out runs/voc/run", "--out runs/voc/run --num-epochs 1")
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "full" in (workplace / "runs/voc/ablation/ablation.md").read_text()
    assert (workplace / "runs/voc/evaluation/panel.png").is_file()


def snippet_inputs() -> dict[str, Any]:
    """The names that the Python snippets take for granted."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 255, (200, 220, 3)).astype(np.uint8),
        "semantic_probabilities": np.full((21, 50, 55), 1 / 21),
        "unary": rng.normal(size=(21, 200, 220)).astype(np.float32),
    }


@pytest.mark.usefixtures("without_shape_checks")  # as users run them
def test_the_python_snippets():
    names = snippet_inputs()
    for snippet in blocks("python"):
        exec(snippet, names)  # the README's own code
    assert names["q"].shape == names["unary"].shape
