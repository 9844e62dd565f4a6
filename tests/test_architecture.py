"""The layers and the places of third-party libraries, read off the imports of every module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = sorted((REPOSITORY / "instseg").rglob("*.py"))
# What each part may import of the others. Every file of the package is in one of them.
LAYERS = {
    "checks.py": set(),
    "storage.py": set(),
    "shapes.py": set(),
    "structures.py": {"checks"},
    "config.py": {"checks"},
    "recipes.py": {"config"},
    "__init__.py": {"config", "structures", "crf", "models"},  # the public names
    "lattice": {"checks", "shapes", "config"},
    "crf": {"checks", "shapes", "config", "lattice"},
    "data": {"storage", "config", "structures"},
    "models": {"checks", "shapes", "storage", "config", "structures", "crf", "data"},
    "training": {"checks", "shapes", "config", "structures", "crf", "models", "evaluation"},
    "evaluation": {"checks", "shapes", "storage", "config", "structures"},
    "report": {"storage", "config", "structures", "evaluation"},
    "jobs": {"storage", "config", "structures", "recipes", "crf", "data", "models", "training", "evaluation", "report"},
}
PLACES = {"ray": "jobs/", "mlflow": "jobs/", "cv2": "data/", "fsspec": "storage.py"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = REPOSITORY.joinpath(*node.module.split("."))
            modules = [alias.name for alias in node.names if (inside / f"{alias.name}.py").is_file()]
            yield from (f"{node.module}.{name}" for name in modules)
            if len(modules) < len(node.names):
                yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(REPOSITORY / "instseg").as_posix())
def test_imports_respect_the_layers(path):
    place = path.relative_to(REPOSITORY / "instseg").as_posix()
    part = place.split("/")[0]
    for name in imports(path):
        top, *rest = name.split(".")
        assert place.startswith(PLACES.get(top, "")), f"{place} imports {name}"
        if top == "instseg":
            inside = rest[0] if rest else "__init__"
            assert inside in LAYERS[part] or inside == part.removesuffix(".py"), f"{place} imports {name}"


def test_the_lattice_has_no_circle():
    """The operator knows no backend; none of its files knows who chooses among them."""
    lattice = REPOSITORY / "instseg" / "lattice"
    assert not [name for name in imports(lattice / "operator.py") if name.startswith("instseg")]
    above = {"instseg.lattice", "instseg.lattice.backends"}
    for path in {*lattice.rglob("*.py")} - {lattice / "__init__.py", lattice / "backends.py"}:
        assert not above & set(imports(path)), path


def test_crf_needs_torch_and_numpy_alone():
    """And so does the lattice; numba and triton are imported by their backends only, which plain torch replaces."""
    allowed = {"torch", "numpy", "instseg", *sys.stdlib_module_names}
    optional = {"cpu": {"numba", "llvmlite"}, "triton_backend.py": {"triton"}}
    for part in ("crf", "lattice"):
        for path in (REPOSITORY / "instseg" / part).rglob("*.py"):
            extra = optional.get(path.parent.name, set()) | optional.get(path.name, set())
            assert {name.split(".")[0] for name in imports(path)} <= allowed | extra, path


def test_nothing_is_pickled():
    for path in [*MODULES, *(REPOSITORY / "workflows").glob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]:
        assert not {"pickle", "cloudpickle", "joblib", "dill"} & set(imports(path)), path
        assert not unsafe_loads(ast.parse(path.read_text())), path


# Functions that run the code in a file unless they are told not to.
LOADS = {"torch.load", "torch.hub.load_state_dict_from_url"}
HIDDEN = {"load", "load_state_dict_from_url", "hub", "serialization"}


def unsafe_loads(tree: ast.Module) -> list[str]:
    """Uses of `LOADS` that are no calls with weights_only=True, and other names by which one could come to them."""
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    unsafe = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LOADS:
            keywords = calls[node].keywords if node in calls else []
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in keywords)
            unsafe += [] if safe else [ast.unparse(calls.get(node, node))]
        elif isinstance(node, ast.Attribute) and node.attr in ("get_state_dict", "serialization"):
            unsafe.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            hidden = {"torch", *(f"torch.{name}" for name in HIDDEN)}
            unsafe += [name.name for name in node.names if name.name in hidden and name.asname]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            unsafe += [name.name for name in node.names if name.name in HIDDEN]
    return unsafe


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("torch.load(f, weights_only=True)", True),
        ("torch.hub.load_state_dict_from_url(u, progress=False, weights_only=True)", True),
        ("from safetensors.torch import load; load(b)", True),
        ("torch.load(f)", False),
        ("torch.load(f, weights_only=False)", False),
        ("torch.load(f, weights_only=safe)", False),
        ("torch.load(f, **options)", False),
        ("read = torch.load", False),
        ("torch.load(torch.load(f), weights_only=True)", False),
        ("from torch import load", False),
        ("from torch.serialization import load as read", False),
        ("import torch as t; t.load(f)", False),
        ("torch.hub.load_state_dict_from_url(u)", False),
        ("weights.get_state_dict()", False),
    ],
)
def test_loading_without_weights_only_is_recognised(source: str, safe: bool) -> None:
    assert (not unsafe_loads(ast.parse(source))) == safe


# Folders of somebody's machine, and where somebody's packages come from.
PRIVATE = re.compile(
    r"(?<![\w.>}])/(?:root|work|(?:home|Users)/\w+)\b(?:/|$)|\b(?:pypi|pythonhosted|npmjs)\.\w|index[-]url"
)


@pytest.mark.parametrize("text", ["cd {}root/x", "={}home/ann/x", '"{}Users/ann/x"', "{}work/main/x", "pypi{}org"])
def test_what_is_private_is_recognised(text):
    assert PRIVATE.search(text.format("." if "pypi" in text else "/"))


def test_no_file_names_a_home_or_a_package_index():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode().split("\0")
    contents = {name: (REPOSITORY / name).read_bytes() for name in names if (REPOSITORY / name).is_file()}
    texts = {name: content.decode() for name, content in contents.items() if b"\0" not in content}
    assert {"README.md", "Makefile", "requirements.lock", "infra/Dockerfile", "tests/conftest.py"} <= texts.keys()
    found = [f"{name}: {line}" for name, text in texts.items() for line in text.splitlines() if PRIVATE.search(line)]
    assert not found
