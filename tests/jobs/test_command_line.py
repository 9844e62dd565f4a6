"""Every command: what a user can cause is one line and an exit status, and --help is quick."""

from __future__ import annotations

import errno
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from instseg.config import EvaluateConfig, ModelConfig, SemanticCrfConfig, TrainConfig
from instseg.jobs import command_line
from instseg.jobs.cluster import JobError
from instseg.models.checkpoint import save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.recipes import small_stage1
from tests.jobs.ending import parsed

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.py"))
RUNS = ["train", "evaluate", "ablate", "crossvalidate"]
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a workflow's script with arguments; its exit status and what it says of the failure."""

    def run(name: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        monkeypatch.syspath_prepend(REPOSITORY / "workflows")  # as Python does, where the script takes it away
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(REPOSITORY / "workflows" / f"{name}.py"), run_name="__main__")
        assert isinstance(left.value.code, int)
        return left.value.code, capsys.readouterr().err

    return run


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(config: Any) -> None:
        raise error

    monkeypatch.setattr(import_module("instseg.jobs.evaluate"), "evaluate", fail)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("scores: expected\n  numbers"), 2, "error: scores: expected numbers"),
        (FloatingPointError("loss is nan"), 2, "error: loss is nan"),
        (JobError("Ray did not start"), 2, "error: Ray did not start"),
        (FileNotFoundError("data d: no such folder"), 2, "error: data d: no such folder"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: no space left on the disk of out; make room"),
        (OSError(errno.ENOSPC, "No space left", "out/f"), 2, "error: no space left on the disk of out/f; make room"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    fails_with(monkeypatch, error)
    code, said = command("evaluate", "--data", "d", "--out", "out")
    assert code == status
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, KeyError("bug"))
    monkeypatch.setattr("sys.argv", ["evaluate", "--data", "d", "--out", "out"])
    with pytest.raises(KeyError, match="bug"):
        command_line.evaluate()


@pytest.mark.parametrize("name", RUNS)
def test_mistakes_are_named(command: Command, name: str, tmp_path: Path) -> None:
    assert command(name, "--data", "d", "--out", str(tmp_path), "--device", "tpu")[0] == 2
    code, said = command(name, "--data", "nowhere", "--out", str(tmp_path))
    assert code == 2
    assert "run workflows/prepare.py first" in said
    assert "--num-" in command(name, "--data", "d", "--out", str(tmp_path), "--num-actor", "2")[1]


@pytest.mark.parametrize("name", [*RUNS, "inspect", "predict"])
@pytest.mark.parametrize("under", ["", "sub/folder"])
def test_out_must_be_a_folder(command: Command, tiny_data: Path, tmp_path: Path, name: str, under: str) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / under
    code, said = command(name, "--data", str(tiny_data), "--out", str(out))
    assert (code, said.count("\n")) == (2, 1)
    assert f"error: out {out}: expected a folder or a new name, but {tmp_path / 'file'} is a file" in said


@pytest.mark.parametrize("name", ["train", "crossvalidate"])
def test_a_recipe_sets_the_defaults(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    taken = []
    monkeypatch.setattr(import_module(f"instseg.jobs.{name}"), name, taken.append)
    monkeypatch.setattr("sys.argv", [name, "--recipe", "small_stage1", "--data", "d", "--out", "o", "--device", "cpu"])
    getattr(command_line, name)()
    assert taken[0].num_epochs == small_stage1("d", "o").num_epochs != TrainConfig("d", "o").num_epochs
    assert (taken[0].model.semantic, taken[0].device) == ("fcn8s", "cpu")
    assert "did you mean 'small_stage1'" in command(name, "--recipe", "smal_stage1", "--data", "d", "--out", "o")[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = replace(ModelConfig(), background="literal", semantic_crf=SemanticCrfConfig(num_iterations=9))
    folder = tmp_path / "checkpoints" / "epoch_0001"
    settings = {"model": asdict(model), "num_labels": 4}
    save_checkpoint(folder, InstanceNetwork(model, 4).state_dict(), settings, state={"epoch": 1})
    return folder


def test_options_change_what_the_checkpoint_was_trained_with(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[EvaluateConfig] = []
    monkeypatch.setattr(import_module("instseg.jobs.evaluate"), "evaluate", taken.append)
    run = ["evaluate", "--data", "d", "--out", "o", "--checkpoint", str(checkpoint.parents[1])]
    for options in ([], ["--model.background", "rescored"]):  # the default, which must not lose against the checkpoint
        monkeypatch.setattr("sys.argv", run + options)
        command_line.evaluate()
    assert [config.checkpoint for config in taken] == [str(checkpoint)] * 2
    models = [config.model for config in taken]
    assert [model.semantic_crf.num_iterations for model in models if model] == [9, 9]
    assert [model.background for model in models if model] == ["literal", "rescored"]


@pytest.mark.parametrize("option", ["--model.semantic-crf.spatial-weight=1.0", "--model.semantic_weights=w"])
@pytest.mark.parametrize("name", ["evaluate", "ablate"])
def test_initial_weights_beside_a_checkpoint_are_refused(
    command: Command, checkpoint: Path, name: str, option: str
) -> None:
    code, said = command(name, "--data", "d", "--out", "o", "--checkpoint", str(checkpoint), option)
    assert code == 2
    assert f"{option.split('=')[0].replace('_', '-')}: has no effect beside the trained weights" in " ".join(
        said.split()
    )


def test_help_needs_no_heavy_imports(tmp_path: Path) -> None:
    """All commands in one process, each asked for its options, and one mistyped."""
    script = (
        "import sys\n"
        "from instseg.jobs import command_line\n"
        "def leave(command, *arguments):\n"
        "    sys.argv = ['command', *arguments]\n"
        "    try:\n"
        "        command()\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"for name in {[path.stem for path in WORKFLOWS]}:\n"
        "    leave(getattr(command_line, name), '--help')\n"
        "leave(command_line.evaluate, '--dota', 'd')\n"
        "print('imported', *{'torch', 'ray', 'mlflow'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "imported", done.stdout + done.stderr
    for option in ("--devkit", "--recipe", "--num-actors", "--model.semantic-crf.kernels.accuracy"):
        assert option in done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_help_has_an_example_that_can_be_typed(
    path: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path / "runs/voc/run/checkpoints/epoch_0001")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^Example: (.*)$", inspect.getdoc(getattr(command_line, path.stem)) or "", re.MULTILINE)
    assert example.startswith(f"workflows/{path.name} ")
    assert parsed(example).out


def test_scripts_and_console_commands_are_the_same() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"instseg-{path.stem}": f"instseg.jobs.command_line:{path.stem}" for path in WORKFLOWS}
    for path in WORKFLOWS:
        assert callable(getattr(command_line, path.stem))
        assert os.access(path, os.X_OK)
        assert len(path.read_text().splitlines()) <= 30


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_script_runs_on_its_own(path: Path, tmp_path: Path) -> None:
    """Though one of its folder is called as a module of the standard library, which dataclasses import."""
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
