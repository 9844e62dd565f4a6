"""The triton lattice against the torch one: on a GPU where there is one, and interpreted on a CPU everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from instseg.lattice import Lattice, backends, build_lattice, torch_backend
from instseg.lattice.operator import zeros
from instseg.lattice.torch_backend import TorchLattice
from tests.lattice.test_lattice import both, message, positions, random_values

triton_backend = pytest.importorskip(
    "instseg.lattice.triton_backend", reason="triton is not installed", exc_type=ImportError
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
REPOSITORY = Path(__file__).resolve().parents[2]
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1 before the import"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
cases = pytest.mark.parametrize(
    ("normalization", "ring", "num_labels"),
    [
        ("after", True, 1),
        ("none", True, 3),
        ("symmetric", True, 3),
        ("none", False, 1),
        ("symmetric", False, 21),
        ("after", False, 40),
    ],
)
SIZE = (4, 5) if INTERPRETED else (24, 30)
NUM_POINTS = SIZE[0] * SIZE[1]


def close(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    return {"rtol": 1e-12, "atol": 1e-12 * scale} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4 * scale}


def kernels(dtype: torch.dtype, height: int = SIZE[0], width: int = SIZE[1]) -> list[torch.Tensor]:
    """Away from the borders of simplices, where rounding, which differs between devices, chooses the side."""
    return [(kernel + 0.0137).to(DEVICE, dtype) for kernel in both(height, width)]


@pytest.fixture
def built(monkeypatch):
    """Builds a triton lattice, and the torch lattice on the CPU that has the same numbers."""

    def build(*arguments, **options) -> tuple[Any, TorchLattice]:
        lattice = build_lattice(*arguments, **options)
        assert isinstance(lattice, triton_backend.TritonLattice)
        values = {field.name: getattr(lattice, field.name) for field in fields(TorchLattice)}
        return lattice, TorchLattice(**tree_map_only(torch.Tensor, torch.Tensor.cpu, values))

    if INTERPRETED:
        monkeypatch.setattr(backends, "_backend", lambda device: triton_backend)
    return build


def assert_same(ours: torch.Tensor, reference: torch.Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(ours.detach().cpu(), reference.detach(), **close(ours.dtype, scale))


@pytest.mark.skipif(INTERPRETED, reason="is what this starts")
def test_interpreted_on_a_cpu():
    """The rest of this file, in a process that has the variable before it decorates kernels."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@on_device
@dtypes
@cases
def test_maps_are_those_of_torch(built, normalization, ring, num_labels, dtype):
    lattice, reference = built(kernels(dtype), normalization, ring=ring)
    for ours, theirs in ((lattice, reference), (lattice.adjoint(), reference.adjoint())):
        values, energy = (random_values(NUM_POINTS, num_labels, seed=seed, dtype=dtype) for seed in (0, 1))
        matrices = random_values(2, num_labels, num_labels, seed=2, dtype=dtype)
        expected = theirs.splat(values)
        on_vertices = ours.splat(values.to(DEVICE))
        assert_same(on_vertices, expected)
        expected = theirs.blur(expected)
        on_vertices = ours.blur(on_vertices)
        assert_same(on_vertices, expected)
        assert_same(
            ours.apply_compatibility(on_vertices, matrices.to(DEVICE)),
            theirs.apply_compatibility(expected, matrices),
            scale=num_labels,
        )
        for rows in (energy, zeros(energy)):
            assert_same(ours.slice(on_vertices, rows.to(DEVICE)), theirs.slice(expected, rows))
        assert_same(ours.slice_softmax(on_vertices, energy.to(DEVICE)), theirs.slice_softmax(expected, energy))
        one = zeros(energy)
        assert_same(ours.slice_softmax(one.to(DEVICE), energy.to(DEVICE)), theirs.slice_softmax(one, energy))


@on_device
@dtypes
@pytest.mark.parametrize("num_labels", [1, 3, 21, 40, 1024, 1100])
def test_softmax_is_that_of_torch_and_safe(dtype, num_labels):
    """Also of energies whose exponentials overflow, and of rows laid out by columns."""
    energy = 2000 * random_values(num_labels, 70, dtype=dtype).T - 1000
    grad = random_values(70, num_labels, seed=1, dtype=dtype)
    q = triton_backend.softmax(energy.to(DEVICE))
    assert torch.isfinite(q).all()
    assert_same(q, torch_backend.softmax(energy))
    backward = triton_backend.softmax_backward(q, grad.to(DEVICE))
    assert_same(backward, torch_backend.softmax_backward(q.cpu(), grad))


@on_device
@dtypes
def test_more_labels_than_a_tile_holds(built, dtype):
    lattice, reference = built(kernels(dtype, 2, 3), "after")
    values, energy = random_values(6, 1100, dtype=dtype), random_values(6, 1100, seed=1, dtype=dtype)
    on_vertices = lattice.blur(lattice.splat(values.to(DEVICE)))
    expected = reference.blur(reference.splat(values))
    assert_same(on_vertices, expected)
    assert_same(lattice.slice_softmax(on_vertices, energy.to(DEVICE)), reference.slice_softmax(expected, energy))


@on_device
@dtypes
@pytest.mark.parametrize(("num_points", "num_levels"), [(64, 1), (65, 2), (300, 2), (64 * 64 + 1, 3)])
def test_a_run_longer_than_a_chunk(built, dtype, num_points, num_levels):
    """All points in one cell of the lattice, so that each of its corners is touched by every point."""
    features = [0.001 * positions(1, num_points, num_points).to(DEVICE, dtype) + 0.1]
    lattice, reference = built(features)
    assert len(lattice.levels) == num_levels
    values = random_values(num_points, 3, dtype=dtype)
    assert_same(lattice.splat(values.to(DEVICE)), reference.splat(values))


def with_gradients(lattice: Lattice, device: torch.device, dtype: torch.dtype, num_labels: int) -> list[torch.Tensor]:
    """The results of `update`, `infer` with and without normalisation and `energy`, each with all its gradients."""
    shapes = (NUM_POINTS, num_labels), (NUM_POINTS, num_labels), (2, num_labels, num_labels)
    tensors = [random_values(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    tensors[2] /= num_labels
    tensors.append(random_values(NUM_POINTS, num_labels, seed=3, dtype=dtype))
    results = []
    for compute in (
        lambda q, energy, matrices: lattice.update(q, energy, matrices),
        lambda q, energy, matrices: lattice.energy(q, energy, matrices),
        lambda q, energy, matrices: lattice.infer(energy, matrices, 3, normalize=True) + 0 * q,
        lambda q, energy, matrices: lattice.infer(energy, matrices, 3, normalize=False) + 0 * q,
    ):
        *inputs, cotangent = (tensor.to(device, copy=True) for tensor in tensors)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        result = compute(*inputs)
        results += [result, *torch.autograd.grad(result, inputs, cotangent)]
    return results


@on_device
@dtypes
@cases
def test_steps_and_gradients_are_those_of_torch(built, monkeypatch, normalization, ring, num_labels, dtype):
    lattice, reference = built(kernels(dtype), normalization, ring=ring)
    ours = with_gradients(lattice, DEVICE, dtype, num_labels)
    monkeypatch.setattr(backends, "_backend", lambda device: torch_backend)
    for one, other in zip(ours, with_gradients(reference, torch.device("cpu"), dtype, num_labels), strict=True):
        assert_same(one, other, scale=10)


@on_device
def test_inference_leaves_the_gradient_that_it_is_given(built):
    lattice, _ = built(kernels(torch.float32))
    energy = random_values(NUM_POINTS, 3).float().to(DEVICE).requires_grad_()
    given = torch.ones_like(energy)
    lattice.infer(energy, torch.ones(2, 3, 3, device=DEVICE), 2, normalize=False).backward(given)
    assert (given == 1).all()


@on_device
@dtypes
def test_the_whole_is_that_of_a_cpu_from_the_features_on(built, monkeypatch, dtype):
    lattice, _ = built(kernels(dtype), "symmetric", ring=True)
    values = random_values(NUM_POINTS, 21, dtype=dtype)
    ours = message(lattice, values.to(DEVICE), 2.0, 3.0)
    monkeypatch.setattr(backends, "_backend", lambda device: torch_backend)
    reference = build_lattice([kernel.cpu() for kernel in kernels(dtype)], "symmetric", ring=True)
    assert_same(ours, message(reference, values, 2.0, 3.0))


@on_device
@pytest.mark.parametrize("normalization", ["after", "symmetric", "none"])
def test_a_ragged_batch_is_its_images(built, normalization):
    images = [kernels(torch.float64, *size) for size in ((3, 4), (1, 1), (5, 2))]
    lengths = [len(features[0]) for features in images]
    values = random_values(sum(lengths), 3).to(DEVICE)
    batch, _ = built([torch.cat(parts) for parts in zip(*images, strict=True)], normalization, lengths=lengths)
    got = message(batch, values, 1.0, 2.0).split(lengths)
    for features, image_values, image_got in zip(images, values.split(lengths), got, strict=True):
        alone, _ = built(features, normalization)
        torch.testing.assert_close(image_got, message(alone, image_values, 1.0, 2.0), rtol=0, atol=1e-14)


@on_device
def test_two_runs_are_equal_bit_for_bit(built):
    size = SIZE if INTERPRETED else (240, 320)
    num_points = size[0] * size[1]

    def run() -> list[torch.Tensor]:
        lattice, _ = built(kernels(torch.float32, *size), "after", ring=not INTERPRETED)
        shapes = (num_points, 21), (num_points, 21), (2, 21, 21)
        inputs = [random_values(*shape, seed=seed).float().to(DEVICE) for seed, shape in enumerate(shapes)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        result = lattice.update(*inputs) + lattice.infer(*inputs[1:], 3, normalize=True)
        return [lattice.slice_weights, result, *torch.autograd.grad((result * result).sum(), inputs)]

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_this_backend():
    assert backends._backend(DEVICE) is triton_backend
