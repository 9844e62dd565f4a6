"""DenseCRF as a user calls it: golden marginals, brute force, invariants, gradients, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from instseg.config import KernelConfig, SemanticCrfConfig
from instseg.crf import DenseCRF, HigherOrderCRF
from instseg.crf.mean_field import PairwiseTerm, mean_field
from instseg.crf.pairwise import build_kernels, message_matrices, potts
from tests.oracles import DenseKernels, gaussian_kernel

THETAS = {"p80": (80.0, 13.0, 3.0), "p160": (160.0, 3.0, 3.0)}
NORMALIZATIONS = {"sym": "symmetric", "after": "after"}


def golden(folder, name):
    with np.load(folder / "golden" / name) as arrays:
        return {key: arrays[key] for key in arrays}


def infer(case, theta, normalization, num_iterations):
    kernels = KernelConfig(*THETAS[theta], normalization=NORMALIZATIONS[normalization])  # pyright: ignore
    crf = DenseCRF(len(case["unary_energy"]), kernels, 3.0, 10.0, num_iterations)
    return crf(case["image"], case["unary_energy"])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("num_iterations", [1, 5, 10])
def test_reproduces_the_reference_library(shared_data, theta, normalization, num_iterations):
    case = golden(shared_data, "crf_60x80_L4.npz")
    expected = case[f"pydensecrf_{theta}_{normalization}_it{num_iterations}"]
    assert np.abs(infer(case, theta, normalization, num_iterations) - expected).max() < 1e-4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("theta", THETAS)
def test_reproduces_the_reference_library_with_21_labels(shared_data, theta, normalization):
    case = golden(shared_data, "crf_120x160_L21.npz")
    marginals = infer(case, theta, normalization, 10)
    expected = case[f"pydensecrf_{theta}_{normalization}_it10"].astype(np.float32)
    # the golden file holds float16 here, half of whose last place is 2.4e-4 near 1
    assert np.abs(marginals - expected).max() < 1e-4 + 2.5e-4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("theta", THETAS)
def test_as_close_to_exact_inference_as_the_reference_library(shared_data, theta, normalization):
    case = golden(shared_data, "crf_60x80_L4.npz")
    exact, reference = (case[f"{kind}_{theta}_{normalization}_it10"] for kind in ("exact", "pydensecrf"))
    marginals = infer(case, theta, normalization, 10)
    assert np.abs(marginals - exact).mean() < np.abs(reference - exact).mean() + 1e-6
    agreement = [(candidate.argmax(0) == exact.argmax(0)).mean() for candidate in (marginals, reference)]
    assert agreement[0] >= agreement[1] - 1e-3


def small_problem(height=12, width=15, num_labels=4, seed=0):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 255, (height, width, 3)).astype(np.uint8)
    return image, generator.normal(size=(num_labels, height, width)).astype(np.float32)


def one_kernel(kernels, index, values):
    """K_index values, the other kernel's matrix 0."""
    matrices = torch.zeros(2, values.shape[1], values.shape[1], dtype=values.dtype)
    matrices[index] = torch.eye(values.shape[1], dtype=values.dtype)
    return kernels.energy(values, torch.zeros_like(values), matrices)


@pytest.mark.parametrize("accuracy", ["fast", "ring", "exact"])
@pytest.mark.parametrize("normalization", ["after", "symmetric", "none"])
def test_normalisations_against_dense_matrices(normalization, accuracy):
    """The operator as a dense matrix, normalised by the textbook formulas."""
    image, _ = small_problem(5, 6)
    values = torch.rand(30, 2, dtype=torch.float64)
    tensor = torch.from_numpy(image).double()
    raw = build_kernels(tensor, KernelConfig(normalization="none", accuracy=accuracy))
    kernels = build_kernels(tensor, KernelConfig(normalization=normalization, accuracy=accuracy))
    for index in range(2):
        dense = one_kernel(raw, index, torch.eye(30, dtype=torch.float64))
        norm = dense.sum(1, keepdim=True)
        scaled = {"after": dense / norm, "symmetric": dense / norm.sqrt() / norm.sqrt().T, "none": dense}
        torch.testing.assert_close(
            one_kernel(kernels, index, values), scaled[normalization] @ values, rtol=0, atol=1e-12
        )


def test_whole_inference_against_brute_force_kernels():
    """With true Gaussian matrices in the place of lattices, inference agrees where the lattice is accurate."""
    y, x = torch.meshgrid(torch.arange(20).double(), torch.arange(24).double(), indexing="ij")
    position = torch.stack([x, y], 2).reshape(-1, 2)
    image = torch.stack([3 * x, 4 * y, 2 * x + y], 2)
    config = KernelConfig(theta_alpha=20.0, theta_beta=30.0, theta_gamma=3.0)
    color = image.reshape(-1, 3) / config.theta_beta
    features = (position / config.theta_gamma, torch.cat([position / config.theta_alpha, color], 1))
    exact = [gaussian_kernel(f) for f in features]
    exact = [k / k.sum(1, keepdim=True) for k in exact]
    unary = torch.randn(480, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = message_matrices((torch.tensor(3.0).double(), torch.tensor(4.0).double()), potts(3, unary))

    def marginals(kernels):
        return mean_field(unary, PairwiseTerm(kernels, matrices), None, 5).q

    expected = marginals(DenseKernels(exact))
    assert (marginals(build_kernels(image, config)) - expected).abs().mean() < 0.02
    exact_kernels = build_kernels(image, replace(config, accuracy="exact"))
    torch.testing.assert_close(marginals(exact_kernels), expected, rtol=0, atol=1e-12)


def test_label_permutation():
    image, unary = small_problem()
    crf = DenseCRF(4)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(crf(image, unary[order]), crf(image, unary)[order], atol=1e-6)


def test_numpy_and_torch_agree_and_zero_iterations_is_softmax():
    image, unary = small_problem()
    crf = DenseCRF(4, num_iterations=3)
    torch_result = crf(torch.from_numpy(image), torch.from_numpy(unary))
    np.testing.assert_array_equal(torch_result.detach().numpy(), crf(image, unary))
    np.testing.assert_allclose(torch_result.detach().sum(0), 1.0, atol=1e-5)
    plain = DenseCRF(4, num_iterations=0)(image, unary)
    np.testing.assert_allclose(plain, torch.from_numpy(-unary).softmax(0), atol=1e-6)


class Inference(torch.nn.Module):
    """A 4x5 image with two detections, as one function of unaries and of every CRF parameter."""

    def __init__(self):
        super().__init__()
        self.crf = HigherOrderCRF(3, SemanticCrfConfig(num_iterations=3)).double()
        self.image, self.unary = small_problem(4, 5, 3)
        self.kernels = build_kernels(torch.from_numpy(self.image).double(), self.crf.config.kernels)
        self.foregrounds = (torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5).double()

    def forward(self, unary):
        scores = torch.tensor([0.8, 0.3], dtype=torch.float64)
        potential = self.crf.potential(torch.tensor([1, 2]), scores, self.foregrounds)
        state = self.crf(unary, self.kernels, potential)
        return state.log_q, state.validity


def test_gradcheck_through_a_whole_inference_with_detections():
    """T = 3 into unaries, kernel weights, compatibility and, through Y, both detection weights."""
    inference = Inference()
    names, parameters = zip(*inference.named_parameters(), strict=True)
    assert len(names) == 5

    def run(unary, *values):
        return torch.func.functional_call(inference, dict(zip(names, values, strict=True)), (unary,))

    unary = torch.from_numpy(inference.unary).double().flatten(1).T.contiguous()
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (unary, *parameters)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (9, 1)])
def test_degenerate_sizes_and_one_label(height, width):
    image, unary = small_problem(height, width, 1)
    np.testing.assert_allclose(DenseCRF(1)(image, unary), 1.0)


@pytest.mark.parametrize("accuracy", ["fast", "ring", "exact"])
def test_a_ragged_batch_is_its_images(accuracy):
    problems = [small_problem(12, 15), small_problem(1, 1), small_problem(9, 30, seed=1)]
    crf = DenseCRF(4, KernelConfig(accuracy=accuracy))
    for got, (image, unary) in zip(crf.batch(*zip(*problems, strict=True)), problems, strict=True):
        np.testing.assert_allclose(got, crf(image, unary), rtol=0, atol=0 if accuracy != "exact" else 1e-6)
    with pytest.raises(ValueError, match="as many unaries as images, 1 or more; got 1, 0"):
        crf.batch([], [problems[0][1]])


def test_the_more_exact_kernels_are_closer_to_exact_inference(shared_data):
    case = golden(shared_data, "crf_60x80_L4.npz")
    exact = case["exact_p80_after_it10"]
    errors = {}
    for accuracy in ("fast", "ring", "exact"):
        kernels = KernelConfig(*THETAS["p80"], accuracy=accuracy)
        q = DenseCRF(4, kernels, 3.0, 10.0, 10)(case["image"], case["unary_energy"])
        errors[accuracy] = np.abs(q - exact).mean()
    # measured: 2.7e-3, 1.5e-4, 1e-8
    assert errors["ring"] < 0.1 * errors["fast"]
    assert errors["exact"] < 1e-6


@pytest.mark.parametrize("accuracy", ["fast", "ring", "exact"])
def test_an_image_that_is_not_finite_is_refused(accuracy):
    with pytest.raises(ValueError, match="features: expected finite values"):
        build_kernels(torch.full((3, 4, 3), torch.nan), KernelConfig(accuracy=accuracy))


def test_more_labels_than_memory_holds():
    """The unary is a view of one number: nothing is allocated before the error."""
    unary = torch.zeros(1).expand(10_000, 4_000, 4_000)
    with pytest.raises(ValueError, match=r"10000 labels for 16000000 pixels need 1788.1 GiB"):
        DenseCRF(10_000)(torch.zeros(1, dtype=torch.uint8).expand(4_000, 4_000, 3), unary)


def test_bad_input():
    image, unary = small_problem()
    with pytest.raises(ValueError, match=r"unary: expected shape .*\(5, 12, 15\), got \(4, 12, 15\)"):
        DenseCRF(5)(image, unary)
    unary[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="unary: expected finite"):
        DenseCRF(4)(image, unary)
    with pytest.raises(ValueError, match=r"image: expected shape \(H, W, 3\)"):
        DenseCRF(4)(image[..., :2], np.zeros_like(unary))
    with pytest.raises(ValueError, match="theta_beta: expected a value > 0, got 0"):
        KernelConfig(theta_beta=0.0)
