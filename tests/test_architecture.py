"""The layers and the places of third-party libraries, read off the imports of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = sorted((REPOSITORY / "instseg").rglob("*.py"))
# what each part may import of the others; everything may import structures, config and progress
LAYERS = {
    "crf": set(),
    "data": {"cluster"},
    "evaluation": {"visualize", "cluster"},
    "models": {"crf", "data"},
    "training": {"crf", "data", "models", "recipes", "tracking", "cluster"},
}
PLACES = {
    "ray": ("data/prepare.py", "training/", "evaluation/parallel.py", "cluster.py"),
    "mlflow": ("tracking.py",),
    "cv2": ("data/",),
}
COMMON = {"structures", "config", "progress"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(REPOSITORY / "instseg").as_posix())
def test_imports_respect_the_layers(path):
    place = path.relative_to(REPOSITORY / "instseg").as_posix()
    part = place.split("/")[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top in PLACES:
            assert place.startswith(PLACES[top]), f"{place} imports {name}"
        if top == "instseg" and rest and part in LAYERS:
            assert rest[0] in LAYERS[part] | COMMON | {part}, f"{place} imports {name}"


def test_crf_needs_torch_and_numpy_alone():
    """Numba and triton are imported by their own backends only, which plain torch replaces where there is neither."""
    allowed = {"torch", "numpy", "instseg", *sys.stdlib_module_names}
    compiled = ("filter_loops.py", "softmax_loops.py", "build_loops.py", "simd.py", "threads.py")
    optional = {name: {"numba", "llvmlite"} for name in compiled} | {"triton_backend.py": {"triton"}}
    for path in (REPOSITORY / "instseg" / "crf").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed | optional.get(path.name, set()), path


def test_no_pickle_and_no_absolute_home_paths():
    tracked = [*MODULES, *(REPOSITORY / "workflows").glob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]
    for path in tracked:
        assert not {"pickle", "cloudpickle", "joblib", "dill"} & set(imports(path)), path
        assert "torch.load" not in path.read_text(), path
