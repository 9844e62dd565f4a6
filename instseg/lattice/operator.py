"""What a lattice is, and what a mean-field step does with its maps; how they are applied, the backends say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Lattice(ABC):
    """The linear operators K_m ~ exp(-|f_i - f_j|^2 / 2) over the feature vectors f of N points, one for each kernel m.

    Values on the vertices are (V, L) with the M <= V vertices of all kernels first; what stands behind them is the
    backend's.

    Attributes:
        kernels: The vertices of each kernel, which follow one another.
        splat_weights: (N, C), what a point's value is multiplied by for each of its corners.
        slice_weights: (N, C), what the values there are multiplied by for the point; mostly the same.
    """

    kernels: tuple[slice, ...]
    splat_weights: Tensor
    slice_weights: Tensor

    @abstractmethod
    def splat(self, values: Tensor) -> Tensor:
        """On each vertex the sum of weight * `values` (N, L) over the points that touch it."""

    @abstractmethod
    def blur(self, on_vertices: Tensor) -> Tensor:
        """Each vertex plus half of both neighbours, in one direction after the other; may overwrite its argument."""

    @abstractmethod
    def apply_compatibility(self, on_vertices: Tensor, matrices: Tensor, overwrite: bool = False) -> Tensor:
        """Each kernel's vertices times its matrix; may `overwrite` its argument.

        Filtering acts on pixels and matrices on labels, so compatibility can be applied here, where rows are fewer.
        """

    @abstractmethod
    def slice(self, on_vertices: Tensor, energy: Tensor) -> Tensor:
        """`energy` (N, L), or (1, L) for all, plus each point's sum of weight * value over its corners."""

    @abstractmethod
    def slice_softmax(self, on_vertices: Tensor, energy: Tensor, overwrite: bool = False) -> Tensor:
        """softmax(-slice(...)) over the labels; may `overwrite` the energy.

        Here and in `step`, (1, L) on the vertices stands for all of them.
        """

    @abstractmethod
    def adjoint(self) -> Lattice:
        """The operators' transposes: splat and slice change places, and each blur, symmetric in itself, its order."""

    @abstractmethod
    def normalized(self, symmetric: bool) -> Lattice:
        """Divided by each kernel's norm K_m 1, by its square root on either side if `symmetric`; may use up the old."""

    @staticmethod
    @abstractmethod
    def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
        """The gradient with respect to the energy, from that of q = softmax(-energy), both (N, L)."""

    @staticmethod
    @abstractmethod
    def as_rows(values: Tensor) -> Tensor:
        """`values` (N, L), or a copy if the backend could not read them as they are."""

    @staticmethod
    @abstractmethod
    def copy_rows(values: Tensor) -> Tensor:
        """A copy of `values` (N, L), laid out as the backend reads it fastest."""

    def energy(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """`energy` (N, L) plus the message sum_m K_m q A_m, with `matrices` A (number of kernels, L, L).

        Differentiable in all three, with the exact adjoint as its backward.
        """
        self._check(matrices, q=q, energy=energy)
        return _Message.apply(q, energy, matrices, self, False)  # pyright: ignore[reportReturnType]

    def update(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """softmax(-energy(...)) (N, L): the marginals after one mean-field step."""
        self._check(matrices, q=q, energy=energy)
        return _Message.apply(q, energy, matrices, self, True)  # pyright: ignore[reportReturnType]

    def infer(
        self, energy: Tensor, matrices: Tensor, num_iterations: int, normalize: bool, overwrite: bool = False
    ) -> Tensor:
        """The energies (N, L) after `num_iterations` >= 1 steps from softmax(-energy), with the same `energy` in each.

        With `normalize` their softmax(-...), which may `overwrite` the energy where no gradient is needed.
        Differentiable in both. For the backward pass each step keeps its blurred vertices and no pixels: the marginals
        are computed again.
        """
        self._check(matrices, energy=energy)
        keep = torch.is_grad_enabled() and (energy.requires_grad or matrices.requires_grad)
        overwrite = overwrite and not keep
        return _Inference.apply(energy, matrices, self, num_iterations, normalize, keep, overwrite)  # pyright: ignore

    def _check(self, matrices: Tensor, **rows: Tensor) -> None:
        """Raise ValueError unless shapes fit: compiled loops do not look."""
        num_points, num_labels = len(self.splat_weights), matrices.shape[-1]
        expected = {"matrices": (len(self.kernels), num_labels, num_labels)} | dict.fromkeys(
            rows, (num_points, num_labels)
        )
        for name, tensor in {"matrices": matrices, **rows}.items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"{name}: expected shape {expected[name]}, got {tuple(tensor.shape)}")

    def step(self, on_vertices: Tensor, energy: Tensor) -> Tensor:
        """splat(slice_softmax(...))."""
        return self.splat(self.slice_softmax(on_vertices, energy))

    def step_backward(
        self, on_vertices: Tensor, grad_on_vertices: Tensor, energy: Tensor, grad_energy: Tensor
    ) -> Tensor:
        """The adjoint of `step` with the gradient that `adjoint().slice` reads; adds to `grad_energy`, in place.

        Returns:
            What the adjoint splats.
        """
        adjoint = self.adjoint()
        grad_q = adjoint.slice(grad_on_vertices, zeros(energy))
        grad = self.softmax_backward(self.slice_softmax(on_vertices, energy), grad_q)
        grad_energy += grad
        return adjoint.splat(grad)

    def inner(self, on_vertices: Tensor, other: Tensor) -> Tensor:
        """(number of kernels, L, L) products on_vertices^T other over each kernel's vertices."""
        return torch.stack([on_vertices[kernel].T @ other[kernel] for kernel in self.kernels])


class _Message(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, energy: Tensor, matrices: Tensor, lattice: Lattice, normalize: bool) -> Tensor:
        blurred = lattice.blur(lattice.splat(q))
        messages = lattice.apply_compatibility(blurred, matrices)
        result = lattice.slice_softmax(messages, energy) if normalize else lattice.slice(messages, energy)
        ctx.lattice = lattice
        ctx.save_for_backward(blurred, matrices, result if normalize else None)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        blurred, matrices, q = ctx.saved_tensors
        adjoint = ctx.lattice.adjoint()
        (grad,) = grad_outputs
        if q is not None:
            grad = ctx.lattice.softmax_backward(q, grad)
        splatted = adjoint.splat(grad)
        grad_matrices = adjoint.inner(blurred, splatted) if ctx.needs_input_grad[2] else None
        grad_q = None
        if ctx.needs_input_grad[0]:
            on_vertices = adjoint.apply_compatibility(adjoint.blur(splatted), matrices.mT, overwrite=True)
            grad_q = adjoint.slice(on_vertices, zeros(on_vertices))
        return grad_q, grad, grad_matrices, None, None


class _Inference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        energy: Tensor,
        matrices: Tensor,
        lattice: Lattice,
        num_iterations: int,
        normalize: bool,
        keep: bool,
        overwrite: bool,
    ) -> Tensor:
        history = []
        energy = lattice.as_rows(energy)
        on_vertices = lattice.step(messages := zeros(energy), energy)
        for iteration in range(num_iterations):
            on_vertices = lattice.blur(on_vertices)
            messages = lattice.apply_compatibility(on_vertices, matrices, overwrite=not keep)
            if keep:
                history.append(on_vertices)
            if iteration < num_iterations - 1:
                on_vertices = lattice.step(messages, energy)
        result = lattice.slice_softmax(messages, energy, overwrite) if normalize else lattice.slice(messages, energy)
        ctx.lattice = lattice
        ctx.save_for_backward(energy, matrices, result if normalize else None, *history)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        energy, matrices, q, *history = ctx.saved_tensors
        lattice, adjoint = ctx.lattice, ctx.lattice.adjoint()
        (grad,) = grad_outputs
        grad_energy = lattice.copy_rows(grad) if q is None else lattice.softmax_backward(q, grad)
        grad_matrices = torch.zeros_like(matrices)
        splatted = adjoint.splat(grad_energy)
        while history:
            blurred = history.pop()
            if ctx.needs_input_grad[1]:
                grad_matrices += adjoint.inner(blurred, splatted)
            grad_on_vertices = adjoint.apply_compatibility(adjoint.blur(splatted), matrices.mT, overwrite=True)
            before = lattice.apply_compatibility(history[-1], matrices) if history else zeros(energy)
            splatted = lattice.step_backward(before, grad_on_vertices, energy, grad_energy)
        return grad_energy, grad_matrices, None, None, None, None, None


def zeros(like: Tensor) -> Tensor:
    """(1, L) energies of 0, which stand for any number of rows."""
    return like.new_zeros(1, like.shape[1])
