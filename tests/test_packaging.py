"""What `pip install instseg` gives: the wheel, without its extra, in an environment that has nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_architecture import LAYERS
from tests.test_readme import blocks

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
UV = Path(sys.executable).with_name("uv")
# The machines where this is slow have no warm cache of compiled loops, or none of packages.
pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def output_of(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    output_of(UV, "build", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def fresh(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and what its metadata ask for, in the versions of the lock.

    The packages come out of uv's cache as links, which takes a second; what is not in it is downloaded.
    """
    folder = tmp_path_factory.mktemp("fresh")
    output_of(UV, "venv", "--python", sys.executable, folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = archives.glob("*.whl")
    lock = REPOSITORY / "requirements.lock"
    output_of(UV, "pip", "install", "--python", python, "--constraints", lock, wheel, cwd=folder)
    return python


def evaluate(python: Path, script: str, cwd: Path) -> str:
    """Run a script in isolation from this repository and this environment; its warnings are errors."""
    return output_of(python, "-I", "-W", "error", "-c", script, cwd=cwd)


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}


def test_the_archives_hold_the_package_and_nothing_else(archives: Path) -> None:
    files = (path for path in (REPOSITORY / "instseg").rglob("*") if path.suffix in (".py", ".css", ".js"))
    sources = {path.relative_to(REPOSITORY).as_posix() for path in files}
    (wheel,), (sdist,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == sources
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside == sources | {"PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}


def test_the_extra_is_not_installed(fresh: Path, tmp_path: Path) -> None:
    script = (
        "import json; from importlib.metadata import distributions, requires\n"
        "print(json.dumps([[d.name.lower() for d in distributions()], requires('instseg')]))"
    )
    installed, required = json.loads(evaluate(fresh, script, tmp_path))
    project = PYPROJECT["project"]
    base, jobs = names_of(project["dependencies"]), names_of(project["optional-dependencies"]["jobs"])
    assert base == {"torch", "numpy", "numba", "safetensors", "opencv-python-headless"}
    assert base <= set(installed)
    of_torch = {"fsspec"}
    assert not (jobs | names_of(PYPROJECT["dependency-groups"]["dev"])) & set(installed) - of_torch
    assert {"ray", "mlflow", "pyarrow", "torchvision", "scipy", "pycocotools", "tyro", "rich", "matplotlib"} <= jobs
    assert names_of([text for text in required if "extra ==" not in text]) == base
    assert names_of([text for text in required if re.search(r"extra == .jobs.", text)]) == jobs


def test_importing_the_crf_imports_nothing_else(fresh: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys, numpy, torch; before = set(sys.modules)\n"
        "import instseg.crf; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    imported = json.loads(evaluate(fresh, script, tmp_path))
    parts = {name.split(".")[1] for name in imported if name.startswith("instseg.")}
    assert {"crf"} <= parts <= {"crf"} | LAYERS["crf"]
    others = {name.split(".")[0] for name in imported} - {"instseg"}
    assert others <= {*sys.stdlib_module_names, "torch", "numpy"}, others


def snippet_inputs() -> dict[str, Any]:
    """The names that the Python snippets take for granted."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 255, (200, 220, 3)).astype(np.uint8),
        "semantic_probabilities": np.full((21, 50, 55), 1 / 21),
        "unary": rng.normal(size=(21, 200, 220)).astype(np.float32),
    }


def test_the_readmes_snippets_run(fresh: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "names.npz", **snippet_inputs())
    checks = (
        "assert q.shape == unary.shape; assert abs(q.sum(0) - 1).max() < 1e-5\n"
        "assert instance_map.instances.shape == image.shape[:2]\n"
        "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    given = "import numpy; globals().update(numpy.load('names.npz'))"
    imported = json.loads(evaluate(fresh, "\n".join([given, *blocks("python"), checks]), tmp_path))
    assert {"instseg", "torch", "numba", "cv2"} <= set(imported)


def test_a_command_says_that_it_needs_the_extra(fresh: Path, tmp_path: Path) -> None:
    for command in PYPROJECT["project"].get("scripts", {}):
        done = run(fresh.with_name(command), "--help", cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "instseg[jobs]" in done.stderr
        assert len(done.stderr.splitlines()) == 1
