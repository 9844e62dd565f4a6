"""The compiled loops on disk: stale after any edit, shared by copies of the same sources, safe to write at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import instseg

SCRIPT = """
import json, torch
from instseg.lattice.cpu.rows import softmax_backward
from instseg.lattice.cpu.softmax_loops import softmax_backward as loop
gradient = softmax_backward(torch.full((4, 2), 0.5), torch.arange(8.0).reshape(4, 2))
print(json.dumps([gradient.tolist(), sum(loop.stats.cache_misses.values())]))
"""
GRADIENT = [[0.25, -0.25]] * 4


def copy_of_the_lattice(folder: Path) -> Path:
    source = Path(instseg.__file__).parent
    shutil.copytree(source / "lattice", folder / "instseg" / "lattice", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("config.py", "checks.py", "shapes.py"):
        shutil.copyfile(source / name, folder / "instseg" / name)
    (folder / "instseg" / "__init__.py").touch()
    for path in folder.rglob("*.py"):
        os.utime(path, (0, hash(str(path)) % 10**9))  # as an archive leaves it
    return folder


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def result(process: subprocess.Popen[str]) -> tuple[list[list[float]], int, str]:
    """The gradient, how many loops were compiled, and what was written to stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return *json.loads(out), err


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """As two processes leave it that compile at once, each from its own copy of the sources."""
    folder = tmp_path_factory.mktemp("cache")
    copies = [copy_of_the_lattice(tmp_path_factory.mktemp("copy")) for _ in range(2)]
    for process in [start(copy, folder) for copy in copies]:
        gradient, _, err = result(process)
        assert gradient == GRADIENT
        assert not err
    return folder


def test_a_copy_of_the_same_sources_compiles_nothing(cache, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert result(start(copy_of_the_lattice(tmp_path), cache)) == (GRADIENT, 0, "")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_an_edit_to_what_a_loop_calls_is_compiled(cache, tmp_path):
    """Numba itself would look at softmax_loops.py alone."""
    folder = copy_of_the_lattice(tmp_path)
    assert result(start(folder, cache))[0] == GRADIENT
    simd = folder / "instseg" / "lattice" / "cpu" / "simd.py"
    edited = simd.read_text().replace("constant(1e-18)", "constant(1e+18)")
    assert edited != simd.read_text()
    simd.write_text(edited)
    gradient, compiled, _ = result(start(folder, cache))
    assert gradient == [[0.0, -0.25]] * 4
    assert compiled == 1


def test_every_source_of_the_loops_is_in_the_name_of_the_folder():
    """What the compiled functions are made of lies in the files of which the folder's name is a hash."""
    cpu = Path(instseg.__file__).parent / "lattice" / "cpu"
    for path in cpu.glob("*.py"):
        makes_code = "@compiled" in path.read_text() or "@intrinsic" in path.read_text()
        assert makes_code == (path.name.endswith("_loops.py") or path.name == "simd.py"), path


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").touch()
    gradient, _, err = result(start(copy_of_the_lattice(tmp_path / "copy"), tmp_path / "file"))
    assert gradient == GRADIENT
    assert err.count("RuntimeWarning: compiled loops cannot be kept") == 1
    assert "set NUMBA_CACHE_DIR to a folder that can be written" in err
