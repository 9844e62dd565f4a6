"""Which backend builds an image's lattice, and turns energies without one into marginals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instseg.checks import choice
from instseg.config import Normalization
from instseg.lattice.embedding import check_features
from instseg.lattice.operator import Lattice


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, energy: Tensor) -> Tensor:
        q = _backend(energy.device).softmax(energy)
        ctx.save_for_backward(q)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (q,) = ctx.saved_tensors
        return _backend(q.device).softmax_backward(q, *grad_outputs)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        return _backend(values.device).copy_rows(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return grad_outputs[0]


def softmax(energy: Tensor) -> Tensor:
    """Marginals (N, L), exp(-energy) normalised; on CPUs several times as fast as torch's where labels are few."""
    return _Softmax.apply(energy)  # pyright: ignore[reportReturnType]


def pixel_major(values: Tensor) -> Tensor:
    """(N, L) from (L, ...), laid out as the backend reads it fastest; differentiable."""
    return _CopyRows.apply(values.flatten(1).T)  # pyright: ignore[reportReturnType]


def build_lattice(
    features: Sequence[Tensor],
    normalization: Normalization = "none",
    *,
    ring: bool = False,
    lengths: Sequence[int] | None = None,
) -> Lattice:
    """Build the lattice of one or several kernels over the same N points.

    Args:
        features: For each kernel (N, C_m), divided by its standard deviation theta; all of one floating dtype.
        normalization: "after" divides by K 1 (CRF-as-RNN); "symmetric" multiplies by (K 1)^-1/2 on either side
            (Kraehenbuehl & Koltun); "none" leaves the lattice's own scale, which lies below the true kernel's.
        ring: Add the vertices next to those that a point touches. Blurring then loses less of what passes through
            them: more exact, for 2 to 6 times the vertices.
        lengths: The numbers of points of several images, in order; no vertex is shared between them.

    Raises:
        ValueError: If there is no such normalisation, features are not finite, there are no points, or they spread so
            far that a lattice coordinate overflows its 64-bit key.
    """
    choice("normalization", normalization, Normalization)
    for kernel in features:
        check_features(kernel)
    lengths = list(lengths or [len(features[0])])
    if any(len(kernel) != sum(lengths) for kernel in features):
        raise ValueError(f"lengths: expected numbers of points that sum up to {len(features[0])}, got {lengths}")
    lattice = _backend(features[0].device).build(features, ring, lengths)
    if normalization != "none":
        return lattice.normalized(symmetric=normalization == "symmetric")
    # The factors that make one isolated vertex reproduce the volume of the continuous Gaussian.
    counts = torch.tensor([kernel.shape[1] for kernel in features])
    factors = (1 / (1 + 0.5 ** counts.double())).repeat_interleave(counts + 1).to(lattice.slice_weights)
    return replace(lattice, slice_weights=lattice.slice_weights * factors)


def _backend(device: torch.device) -> ModuleType:
    """The backend written for `device`, where its compiler is installed; numba and triton are optional."""
    if device.type == "cpu" and find_spec("numba"):
        from instseg.lattice.cpu import backend
    elif device.type == "cuda" and find_spec("triton"):
        from instseg.lattice import triton_backend as backend
    else:
        from instseg.lattice import torch_backend as backend
    return backend
