"""The lattice of every backend: adjoint, permutation, brute force, batches, determinism, bad input."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from instseg.crf.pairwise import potts
from instseg.lattice import Lattice, backends, build_lattice
from instseg.lattice.cpu.lattice import NumbaLattice
from instseg.lattice.torch_backend import _elevate
from tests.oracles import gaussian_kernel

EXACT = {"rtol": 0, "atol": 1e-12}


def positions(height, width, theta) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([x, y], dim=2).reshape(-1, 2) / theta


def photo_features(height=24, width=30, theta=(6.0, 0.2), seed=0) -> torch.Tensor:
    """Positions and smoothly varying colours, float64."""
    generator = torch.Generator().manual_seed(seed)
    color = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    color = torch.nn.functional.interpolate(color[None], size=(height, width), mode="bilinear")[0]
    return torch.cat([positions(height, width, theta[0]), color.flatten(1).T / theta[1]], dim=1)


def both(height=24, width=30) -> list[torch.Tensor]:
    return [positions(height, width, 3.0), photo_features(height, width)]


def random_values(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def message(lattice: Lattice, values: torch.Tensor, *weights: float) -> torch.Tensor:
    """sum_m weight_m K_m values."""
    eye = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    matrices = torch.stack([weight * eye for weight in weights or (1.0,)])
    return lattice.energy(values, torch.zeros_like(values), matrices)


def assert_same_on_threads(run: Callable[[], list[torch.Tensor]], threads: int) -> None:
    """Bit for bit, on one thread and on several."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(single, run(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=["cpu.backend", "torch_backend"])
def backend(request, monkeypatch):
    module = import_module(f"instseg.lattice.{request.param}")
    monkeypatch.setattr(backends, "_backend", lambda device: module)
    return module


@settings(max_examples=25, deadline=None)
@given(
    num_points=st.integers(1, 60),
    num_features=st.integers(1, 6),
    scale=st.floats(0.01, 20),
    seed=st.integers(0, 1000),
    ring=st.booleans(),
)
def test_barycentric_coordinates_reconstruct_every_point(num_points, num_features, scale, seed, ring):
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(num_points, num_features, generator=generator, dtype=torch.float64)
    lattice = build_lattice([features], ring=ring)
    assert isinstance(lattice, NumbaLattice)
    assert (lattice.splat_weights > -1e-9).all()
    torch.testing.assert_close(lattice.splat_weights.sum(1), torch.ones(num_points).double())


@pytest.mark.parametrize("ring", [False, True])
def test_bands_splat_to_rows_of_their_own(ring):
    """Every row is cleared by one band, each band adds to its own only, and every spilled row reaches its vertex."""
    features = [torch.cat([kernel, kernel]) for kernel in both()]
    lattice = build_lattice(features, ring=ring, lengths=[700, 740])
    assert isinstance(lattice, NumbaLattice)
    cleared = [np.concatenate([np.arange(*run) for run in band]) for band in lattice.runs]
    num_vertices, num_rows = lattice.kernels[1].stop, len(lattice.vertex_of_row)
    assert sorted(np.concatenate(cleared)) == list(range(num_rows))
    for band, own in zip(np.split(lattice.rows, lattice.bands[1:-1]), cleared, strict=True):
        assert np.isin(band, own).all()
    vertices, spilled = lattice.spilled
    assert sorted(spilled) == list(range(num_vertices, num_rows))
    assert (lattice.vertex_of_row[spilled] == vertices).all()
    assert (np.diff(vertices) >= 0).all()


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("normalization", ["after", "symmetric", "none"])
def test_backends_agree(normalization, ring, monkeypatch):
    """Numba's vertices are numbered otherwise; the operators, and the steps, are the same."""
    values, energy = random_values(720, 5), random_values(720, 5, seed=1)
    matrices = random_values(2, 5, 5, seed=2)
    results = []
    for name in ("cpu.backend", "torch_backend"):
        module = import_module(f"instseg.lattice.{name}")
        monkeypatch.setattr(backends, "_backend", lambda device, module=module: module)
        lattice = build_lattice(both(), normalization, ring=ring)
        single = build_lattice([f.float() for f in both()], normalization, ring=ring)
        floats = (values.float(), energy.float(), matrices.float())
        results.append([
            torch.tensor(lattice.kernels[1].stop),
            lattice.energy(values, energy, matrices),
            lattice.update(values, energy, matrices),
            single.update(*floats),  # of energies of about 100: a float32 rounding is 1e-5
            backends.softmax(10 * energy.float()),
        ])  # fmt: skip
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12 if ours.dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("num_labels", [1, 2, 9, 24])
def test_matrices_of_potts_form_take_a_short_cut(backend, num_labels):
    lattice = build_lattice(both())
    on_vertices = lattice.splat(random_values(720, num_labels))
    weight = random_values(num_labels, seed=1)
    potts = weight[:, None] * (1.0 - torch.eye(num_labels))
    for matrices in (torch.stack([potts, 3 * potts + torch.eye(num_labels)]), torch.stack([potts.T, potts])):
        messages = lattice.apply_compatibility(on_vertices, matrices)
        for kernel, matrix in zip(lattice.kernels, matrices, strict=True):
            torch.testing.assert_close(messages[kernel], on_vertices[kernel] @ matrix, **EXACT)


def test_adjoint(backend):
    for normalization in ("after", "symmetric", "none"):
        lattice = build_lattice(both(), normalization, ring=True)
        x, y = random_values(720, 3), random_values(720, 3, seed=1)
        forward, backward = message(lattice, x, 2.0, 3.0), message(lattice.adjoint(), y, 2.0, 3.0)
        torch.testing.assert_close((forward * y).sum(), (x * backward).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalization", ["after", "symmetric", "none"])
def test_gradcheck(backend, normalization):
    lattice = build_lattice(both(4, 5), normalization)
    inputs = [random_values(20, 2), random_values(20, 2, seed=1), random_values(2, 2, 2, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lattice.energy, inputs)
    assert torch.autograd.gradcheck(lattice.update, inputs)
    assert torch.autograd.gradcheck(lambda energy, matrices: lattice.infer(energy, matrices, 3, False), inputs[1:])
    assert torch.autograd.gradcheck(lambda energy, matrices: lattice.infer(energy, matrices, 2, True), inputs[1:])
    assert torch.autograd.gradcheck(backends.softmax, inputs[1:2])


def test_float32_gradients_are_those_of_float64(backend):
    def gradients(dtype):
        # away from the borders of simplices, where rounding chooses the side
        lattice = build_lattice([(f + 0.0137).to(dtype) for f in both()], "after")
        inputs = [random_values(720, 9), 5 * random_values(720, 9, seed=1), random_values(2, 9, 9, seed=2)]
        inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        (lattice.update(*inputs) * random_values(720, 9, seed=3).to(dtype)).sum().backward()
        return [torch.as_tensor(tensor.grad) for tensor in inputs]

    for single, double in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_is_its_steps_one_by_one(backend, dtype):
    """And so are its gradients: the whole inference recomputes what the steps keep."""
    lattice = build_lattice([f.to(dtype) for f in both()], "symmetric")
    inputs = [3 * random_values(720, 9).to(dtype), random_values(2, 9, 9, seed=2).to(dtype)]
    results = []
    for whole in (True, False):
        energy, matrices = (tensor.clone().requires_grad_() for tensor in inputs)
        if whole:
            result = lattice.infer(energy, matrices, 3, normalize=True)
        else:
            q = backends.softmax(energy)
            for _ in range(2):
                q = lattice.update(q, energy, matrices)
            result = lattice.update(q, energy, matrices)
        (result * random_values(720, 9, seed=3).to(dtype)).sum().backward()
        results.append([result.detach(), energy.grad, matrices.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 if dtype == torch.float64 else 3e-4)


def test_spatial_filter_approximates_the_gaussian(backend):
    features, values = positions(30, 40, 3.0), random_values(1200, 2)
    exact = gaussian_kernel(features)
    got = message(build_lattice([features], "after"), values)
    error = (got - exact @ values / exact.sum(1, keepdim=True)).abs()
    # measured: mean 0.0026 and maximum 0.013 of a signal in 0..1
    assert error.mean() < 0.004
    assert error.max() < 0.02


def test_the_ring_brings_the_bilateral_filter_closer_to_the_gaussian(backend):
    features, values = photo_features(), random_values(720, 2)
    exact = gaussian_kernel(features)
    expected = exact @ values / exact.sum(1, keepdim=True)
    fast, ring = (build_lattice([features], "after", ring=ring) for ring in (False, True))
    errors = [(message(lattice, values) - expected).abs().mean() for lattice in (fast, ring)]
    assert errors[1] < 0.7 * errors[0]
    assert ring.kernels[0].stop > fast.kernels[0].stop


def test_point_order_does_not_matter(backend):
    features, values = both(), random_values(720, 2)
    order = torch.randperm(720, generator=torch.Generator().manual_seed(1))
    direct = message(build_lattice(features), values, 1.0, 2.0)[order]
    permuted = build_lattice([kernel[order] for kernel in features])
    torch.testing.assert_close(message(permuted, values[order], 1.0, 2.0), direct, **EXACT)


def test_translation_by_a_vector_of_the_lattice_changes_nothing(backend):
    """In the embedding it moves every point by C+1 up in one coordinate and down in another."""
    # away from the borders of simplices, where rounding chooses the side
    features, values = photo_features() + torch.linspace(0.01, 0.02, 5).double().sqrt(), random_values(720, 2)
    origin, *axes = _elevate(torch.cat([torch.zeros(1, 5), torch.eye(5)]).double())
    move = torch.tensor([6.0, 0, 0, -6.0, 0, 0]).double()
    shift = torch.linalg.lstsq(torch.stack(axes, 1) - origin[:, None], move[:, None]).solution[:, 0]
    moved = message(build_lattice([features + shift]), values)
    torch.testing.assert_close(moved, message(build_lattice([features]), values), rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalization", ["after", "symmetric", "none"])
def test_a_ragged_batch_is_its_images(backend, normalization):
    images = [both(6, 7), both(1, 1), both(11, 5)]
    lengths = [len(features[0]) for features in images]
    values = random_values(sum(lengths), 3)
    batch = build_lattice([torch.cat(kernels) for kernels in zip(*images, strict=True)], normalization, lengths=lengths)
    got = message(batch, values, 1.0, 2.0).split(lengths)
    for features, image_values, image_got in zip(images, values.split(lengths), got, strict=True):
        alone = message(build_lattice(features, normalization), image_values, 1.0, 2.0)
        torch.testing.assert_close(image_got, alone, rtol=0, atol=0)


@pytest.mark.parametrize("num_labels", [1, 3, 21, 30])
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_inference_is_bitwise_deterministic_at_any_thread_count(threads, num_labels):
    """As `DenseCRF` runs it: whole steps, compatibility of Potts form, a ragged batch, with gradients."""

    def run():
        lattice = build_lattice([f.float() for f in both(60, 80)], "symmetric", lengths=[3000, 1, 1799])
        energy = (5 * random_values(4800, num_labels)).float().requires_grad_()
        matrices = torch.stack([3 * potts(num_labels, energy.detach()), 10 * potts(num_labels, energy.detach())])
        matrices.requires_grad_()
        result = lattice.infer(energy, matrices, 3, normalize=True)
        (result * result).sum().backward()
        with torch.no_grad():
            alone = lattice.infer(energy.detach(), matrices.detach(), 3, normalize=True)
        return [result.detach(), alone, energy.grad, matrices.grad]

    assert_same_on_threads(run, threads)


@pytest.mark.parametrize("num_labels", [3, 21])
def test_what_lies_in_new_memory_does_not_matter(monkeypatch, num_labels):
    """Memory comes back with whatever is in it: NaN, or numbers that would be rows of nothing."""

    def run():
        lattice = build_lattice([f.float() for f in both(30, 40)], "after", ring=True)
        energy = (5 * random_values(1200, num_labels)).float().requires_grad_()
        potts_matrices = torch.stack([potts(num_labels, energy.detach())] * 2)
        matrices = random_values(2, num_labels, num_labels, seed=2).float().requires_grad_()
        result = lattice.infer(energy, matrices, 3, normalize=True)
        (result * result).sum().backward()
        with torch.no_grad():
            of_potts = lattice.infer(energy.detach(), potts_matrices, 3, normalize=False)
        return [result.detach(), of_potts, energy.grad, matrices.grad]

    def poisoned(shape, dtype, device="cpu"):
        del device
        return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else 0x7F, dtype=dtype)

    expected = run()
    for module in ("cpu.rows", "cpu.backend", "cpu.lattice"):
        monkeypatch.setattr(import_module(f"instseg.lattice.{module}"), "empty", poisoned)
    assert all(torch.equal(*pair) for pair in zip(expected, run(), strict=True))


def test_padding_of_foreign_rows_stays_there(backend):
    """A view of the first labels of longer rows looks like padded rows; what follows may be anything."""
    lattice = build_lattice([f.float() for f in both()])
    wide = torch.full((720, 8), torch.inf)
    wide[:, :3] = 5 * random_values(720, 3).float()
    matrices = torch.stack([potts(3, wide)] * 2)
    got = lattice.infer(wide[:, :3], matrices, 3, normalize=True)
    torch.testing.assert_close(got, lattice.infer(wide[:, :3].clone(), matrices, 3, normalize=True))


@pytest.mark.parametrize("num_labels", [5, 8])
def test_overwriting_inference_returns_the_marginals(backend, num_labels):
    lattice = build_lattice([f.float() for f in both()])
    energy, matrices = random_values(720, num_labels).float(), random_values(2, num_labels, num_labels).float()
    with torch.no_grad():
        expected = lattice.infer(energy, matrices, 2, normalize=True)
        got = lattice.infer(energy.clone(), matrices, 2, normalize=True, overwrite=True)
    assert torch.equal(got, expected)


def test_inference_leaves_the_gradient_that_it_is_given(backend):
    lattice = build_lattice([f.float() for f in both()])
    energy = random_values(720, 8).float().requires_grad_()
    given = torch.ones_like(energy)
    lattice.infer(energy, torch.ones(2, 8, 8), 2, normalize=False).backward(given)
    assert (given == 1).all()


def test_many_bands(monkeypatch):
    """More bands than threads, and a last one that is shorter."""
    monkeypatch.setattr("instseg.lattice.cpu.backend._BAND", 40)
    values = random_values(720, 3)
    ours = message(build_lattice(both(), "after", ring=True), values, 1.0, 2.0)
    monkeypatch.undo()
    torch.testing.assert_close(ours, message(build_lattice(both(), "after", ring=True), values, 1.0, 2.0), **EXACT)


@pytest.mark.parametrize("threads", [2, 4])
def test_bitwise_deterministic_at_any_thread_count(threads):
    def run():
        lattice = build_lattice([f.float() for f in both(60, 80)], "after", ring=True)
        inputs = [random_values(4800, 21), random_values(4800, 21, seed=1), random_values(2, 21, 21, seed=2)]
        inputs = [tensor.float().requires_grad_() for tensor in inputs]
        result = lattice.update(*inputs)
        (result * result).sum().backward()
        return [lattice.slice_weights, result.detach(), *(tensor.grad for tensor in inputs)]

    assert_same_on_threads(run, threads)


@pytest.mark.parametrize(
    ("energy", "matrices", "message"),
    [
        ((720, 5), (2, 3, 3), r"energy: expected shape \(720, 3\), got \(720, 5\)"),
        ((700, 3), (2, 3, 3), r"energy: expected shape \(720, 3\), got \(700, 3\)"),
        ((720, 3), (1, 3, 3), r"matrices: expected shape \(2, 3, 3\), got \(1, 3, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(backend, energy, matrices, message):
    lattice = build_lattice(both())
    with pytest.raises(ValueError, match=message):
        lattice.infer(torch.zeros(energy), torch.zeros(matrices), 2, normalize=True)
    with pytest.raises(ValueError, match=message):
        lattice.update(torch.zeros(720, matrices[1]), torch.zeros(energy), torch.zeros(matrices))
    with pytest.raises(ValueError, match="sum up to 720"):
        build_lattice(both(), lengths=[700, 10])


def test_one_point(backend):
    filtered = message(build_lattice([torch.zeros(1, 5)]), torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(filtered[0, 1] / filtered[0, 0], torch.tensor(1.5))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(0, 2), "N, C >= 1"),
        (torch.tensor([[0.0, float("nan")]]), "finite"),
        (torch.tensor([[0.0, float("inf")]]), "finite"),
        (torch.tensor([[0.0] * 5, [1e5] * 5]), "64-bit key"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(ValueError, match=message):
        build_lattice([features])
