"""The lattice as a linear operator: adjoint, permutation, brute force, bad input."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from instseg.crf.lattice import build_lattice
from tests.oracles import gaussian_kernel


def photo_features(height=24, width=30, theta=(6.0, 0.2), seed=0) -> torch.Tensor:
    """Positions and smoothly varying colours, float64."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    color = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    color = torch.nn.functional.interpolate(color[None], size=(height, width), mode="bilinear")[0]
    return torch.stack([x / theta[0], y / theta[0], *(color / theta[1])], dim=2).reshape(-1, 5)


@settings(max_examples=25, deadline=None)
@given(
    num_points=st.integers(1, 60),
    num_features=st.integers(1, 6),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 1000),
)
def test_barycentric_coordinates_reconstruct_every_point(num_points, num_features, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(num_points, num_features, generator=generator, dtype=torch.float64)
    lattice = build_lattice(features)
    assert (lattice.splat_weights > -1e-9).all()
    sums = torch.zeros(num_points).double().index_add(0, lattice.splat_points, lattice.splat_weights)
    torch.testing.assert_close(sums, torch.ones(num_points).double())
    assert lattice.splat_offsets[-1] == num_points * (num_features + 1)
    # neighbourhood is mutual: j is after i exactly when i is before j
    for before, after in lattice.neighbors.long():
        for vertex in range(lattice.num_vertices):
            if after[vertex] < lattice.num_vertices:
                assert before[after[vertex]] == vertex


def test_adjoint_and_backward():
    lattice = build_lattice(photo_features())
    num = len(lattice.vertices)
    x, y = torch.randn(2, num, 3, dtype=torch.float64)
    forward, backward = lattice.apply_operator(x), lattice.apply_operator(y, transpose=True)
    torch.testing.assert_close((forward * y).sum(), (x * backward).sum(), rtol=1e-12, atol=0)
    x.requires_grad_()
    (lattice.filter(x) * y).sum().backward()
    torch.testing.assert_close(x.grad, backward, rtol=0, atol=0)


def test_gradcheck():
    lattice = build_lattice(photo_features(4, 5))
    values = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lattice.filter, (values,))


def test_spatial_filter_approximates_the_gaussian():
    y, x = torch.meshgrid(torch.arange(30).double(), torch.arange(40).double(), indexing="ij")
    features = torch.stack([x, y], 2).reshape(-1, 2) / 3.0
    values = torch.rand(1200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, lattice = gaussian_kernel(features), build_lattice(features)
    ones = torch.ones(1200, 1, dtype=torch.float64)
    got = lattice.filter(values) / lattice.filter(ones)
    error = (got - exact @ values / exact.sum(1, keepdim=True)).abs()
    # measured: mean 0.0026 and maximum 0.013 of a signal in 0..1
    assert error.mean() < 0.004
    assert error.max() < 0.02


def test_point_order_does_not_matter():
    features = photo_features()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    values = torch.randn(len(features), 2, dtype=torch.float64)
    direct = build_lattice(features).filter(values)[order]
    torch.testing.assert_close(build_lattice(features[order]).filter(values[order]), direct, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 4])
def test_bitwise_deterministic_at_any_thread_count(threads):
    features, before = photo_features(60, 80).float(), torch.get_num_threads()
    values = torch.rand(4800, 21, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_num_threads(1)
        single = build_lattice(features).filter(values)
        torch.set_num_threads(threads)
        assert torch.equal(single, build_lattice(features).filter(values))
    finally:
        torch.set_num_threads(before)


def test_one_point():
    filtered = build_lattice(torch.zeros(1, 5)).filter(torch.tensor([[2.0, 3.0]]))
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
        build_lattice(features)
