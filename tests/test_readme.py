"""The README's commands, run as written on a generated data set with the 20 classes of VOC."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

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


FEWER = {"train": ["--num-epochs=1", "--num-workers=1"], "evaluate": ["--num-actors=1"], "ablate": ["--num-actors=1"]}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray warns of its own defaults
@pytest.mark.usefixtures("ray_cluster", "without_shape_checks")
def test_the_four_commands(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell makes the arguments, this process runs the scripts; what it can spare of each is spared."""
    (script,) = [block for block in blocks("sh") if "workflows/prepare.py" in block]
    commands = arguments_of_python(script, workplace)
    assert [Path(command[0]).stem for command in commands] == ["prepare", "prepare", "train", "evaluate", "ablate"]
    monkeypatch.chdir(workplace)
    for path, *arguments in commands:
        monkeypatch.setattr("sys.argv", [path, *arguments, *FEWER.get(Path(path).stem, [])])
        monkeypatch.syspath_prepend(workplace / "workflows")  # as Python does, where the script takes it away
        runpy.run_path(path, run_name="__main__")
    assert "full" in (workplace / "runs/voc/ablation/ablation.md").read_text()
    assert (workplace / "runs/voc/evaluation/report.html").is_file()
    assert (workplace / "mlflow.db").is_file()


def arguments_of_python(script: str, folder: Path) -> list[list[str]]:
    """What a shell script calls `python` with."""
    (folder / "bin").mkdir()
    stub = folder / "bin" / "python"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    said = subprocess.check_output(["bash", "-euc", script], cwd=folder, env=environment, text=True)
    return [json.loads(line) for line in said.splitlines()]
