"""DenseCRF as a user calls it: golden marginals, brute force, invariants, gradients, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from instseg.config import KernelConfig, SemanticCrfConfig
from instseg.crf import DenseCRF, HigherOrderCRF
from instseg.crf.mean_field import PairwiseTerm, mean_field
from instseg.crf.pairwise import build_kernels, message_matrices, potts
from tests.oracles import DenseKernels, gaussian_kernel

FOLDER = Path(__file__).parent / "golden"
THETAS = {"p80": (80.0, 13.0, 3.0), "p160": (160.0, 3.0, 3.0)}
NORMALIZATIONS = {"sym": "symmetric", "after": "after"}


def golden(folder, name):
    with np.load(folder / name) as arrays:
        return {key: arrays[key] for key in arrays}


def softmax(logits):
    return torch.from_numpy(logits).softmax(0).numpy()


def infer(case, theta, normalization, num_iterations):
    kernels = KernelConfig(*THETAS[theta], normalization=NORMALIZATIONS[normalization])  # pyright: ignore
    crf = DenseCRF(len(case["unary_energy"]), kernels, 3.0, 10.0, num_iterations)
    return crf(case["image"], case["unary_energy"])


@pytest.mark.parametrize("normalization", ["symmetric", "after"])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("num_iterations", [1, 10])
def test_reproduces_the_reference_library_on_a_generated_scene(theta, normalization, num_iterations):
    """Measured 1.1e-5 at most; golden/generate.py says where the marginals come from."""
    case = golden(FOLDER, "pydensecrf_24x32_L3.npz")
    kernels = KernelConfig(*THETAS[theta], normalization=normalization)
    marginals = DenseCRF(3, kernels, 3.0, 10.0, num_iterations)(case["image"], case["unary_energy"])
    error = np.abs(marginals - case[f"{theta}_{normalization}_it{num_iterations}"]).max()
    assert error < 4e-5
    assert np.abs(marginals - softmax(-case["unary_energy"])).max() > 0.1, "the CRF has something to do"


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("num_iterations", [1, 5, 10])
def test_reproduces_the_reference_library(shared_data, theta, normalization, num_iterations):
    case = golden(shared_data / "golden", "crf_60x80_L4.npz")
    expected = case[f"pydensecrf_{theta}_{normalization}_it{num_iterations}"]
    assert np.abs(infer(case, theta, normalization, num_iterations) - expected).max() < 1e-4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("theta", THETAS)
def test_reproduces_the_reference_library_with_21_labels(shared_data, theta, normalization):
    case = golden(shared_data / "golden", "crf_120x160_L21.npz")
    marginals = infer(case, theta, normalization, 10)
    expected = case[f"pydensecrf_{theta}_{normalization}_it10"].astype(np.float32)
    # the golden file holds float16 here, half of whose last place is 2.4e-4 near 1
    assert np.abs(marginals - expected).max() < 1e-4 + 2.5e-4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("theta", THETAS)
def test_as_close_to_exact_inference_as_the_reference_library(shared_data, theta, normalization):
    case = golden(shared_data / "golden", "crf_60x80_L4.npz")
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


@pytest.mark.parametrize("index", [0, 1])
def test_exact_kernels_written_out_pixel_by_pixel(index):
    image, _ = small_problem(3, 4)
    config = KernelConfig(theta_alpha=2.0, theta_beta=90.0, theta_gamma=1.5, normalization="none", accuracy="exact")
    kernels = build_kernels(torch.from_numpy(image).double(), config)
    got = one_kernel(kernels, index, torch.eye(12, dtype=torch.float64))
    for i in range(12):
        for j in range(12):
            (y, x), (other_y, other_x) = divmod(i, 4), divmod(j, 4)
            apart = (x - other_x) ** 2 + (y - other_y) ** 2
            colors = sum((float(a) - float(b)) ** 2 for a, b in zip(image[y, x], image[other_y, other_x], strict=True))
            exponent = apart / 1.5**2 if index == 0 else apart / 2.0**2 + colors / 90.0**2
            assert got[i, j].item() == pytest.approx(math.exp(-exponent / 2), abs=1e-15)


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
    case = golden(shared_data / "golden", "crf_60x80_L4.npz")
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
    with pytest.raises(ValueError, match=r"unary: expected energies that are finite in torch\.float32"):
        DenseCRF(4)(image, unary)
    with pytest.raises(ValueError, match=r"image: expected shape \(H, W, 3\)"):
        DenseCRF(4)(image[..., :2], np.zeros_like(unary))
    with pytest.raises(ValueError, match="theta_beta: expected a value > 0, got 0"):
        KernelConfig(theta_beta=0.0)
    with pytest.raises(ValueError, match="num_iterations: expected a value >= 0, got -3"):
        DenseCRF(4, num_iterations=-3)
    with pytest.raises(ValueError, match="num_labels: expected a value > 0, got 0"):
        DenseCRF(0)
    with pytest.raises(ValueError, match="bilateral_weight: expected a finite number, got nan"):
        DenseCRF(4, bilateral_weight=math.nan)


def test_energies_that_overflow_the_weights_dtype_are_refused():
    image, unary = small_problem()
    huge = np.full(unary.shape, 1e300)
    with pytest.raises(ValueError, match=r"unary: expected energies that are finite in torch\.float32"):
        DenseCRF(4)(image, huge)
    np.testing.assert_allclose(DenseCRF(4).double()(image, huge).sum(0), 1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a.tolist(),
        lambda a: a.astype(np.longdouble),
        np.asfortranarray,
    ],
    ids=["negative strides", "big-endian", "list", "long double", "fortran"],
)
def test_what_numpy_reads_is_used(change):
    image, unary = small_problem()
    expected = DenseCRF(4)(image, unary)
    np.testing.assert_array_equal(DenseCRF(4)(change(image), change(unary)), expected)


def test_an_image_may_be_uint16_read_only_or_a_tensor():
    image, unary = small_problem()
    expected = DenseCRF(4)(image, unary)
    frozen = image.copy()
    frozen.flags.writeable = False
    for other in (image.astype(np.uint16), image.astype(">u2"), frozen, torch.from_numpy(image)):
        np.testing.assert_array_equal(DenseCRF(4)(other, unary), expected)
    sixteen = torch.from_numpy(image.astype(np.uint16))
    np.testing.assert_array_equal(DenseCRF(4)(sixteen, torch.from_numpy(unary)).detach(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"image: expected numbers \(H, W, 3\), RGB 0..255, got None"),
        ({"unary": None}, r"unary: expected numbers \(L, H, W\), got None"),
        ({"image": "cat.jpg"}, r"image: expected numbers .* got str of dtype <U7"),
        ({"image": [[1, 2], [3]]}, r"image: expected numbers .* got list \(setting an array element"),
        ({"image": np.zeros((12, 15, 3), bool)}, r"image: expected numbers .* got dtype torch.bool"),
        ({"image": np.full((12, 15, 3), 60_000, np.uint16)}, r"image: expected values in 0..255, got 60000..60000"),
        ({"image": np.zeros((0, 15, 3), np.uint8)}, r"image: expected shape .* H, W >= 1, got \(0, 15, 3\)"),
        ({"image": torch.zeros(3, 12, 15)}, r"image: expected shape \(H, W, 3\) .*, got \(3, 12, 15\)"),
        ({"unary": np.zeros((4, 0, 15))}, r"unary: expected shape .*\(4, 12, 15\), got \(4, 0, 15\)"),
        ({"unary": np.zeros((4, 12, 15), complex)}, r"unary: expected numbers .* got ndarray of dtype complex128"),
        ({"unary": torch.zeros(4, 12, 15, device="meta")}, "unary: expected a tensor on cpu, .* got one on meta"),
    ],
)
def test_input_that_cannot_be_used_is_named(change, message):
    image, unary = small_problem()
    arguments = {"image": image, "unary": unary} | change
    with pytest.raises(ValueError, match=message):
        DenseCRF(4)(**arguments)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_float_image_in_0_to_1_warns_once_a_call(kind):
    image, unary = small_problem()
    small = kind((image / 255).astype(np.float32))
    with pytest.warns(UserWarning, match=r"image: values in 0..1, expected 0..255; multiply by 255") as caught:
        DenseCRF(4).batch([small, small], [unary, unary])
    assert len(caught) == 1
    DenseCRF(4)(np.zeros_like(image, np.float32), unary)  # black is black on either scale


def test_numpy_goes_to_the_weights_device_and_dtype_and_back(monkeypatch):
    """A device that computes nothing shows where tensors lie; double precision shows that values are converted."""
    image, unary = small_problem()
    seen = []

    def infer(self, images, unaries):
        seen.extend(tensor.device.type for tensor in (*images, *unaries))
        return [torch.zeros(tensor.shape) for tensor in unaries]

    assert DenseCRF(4).double()(image, unary).dtype == np.float64
    monkeypatch.setattr(DenseCRF, "_infer", infer)
    assert isinstance(DenseCRF(4).to("meta")(image, unary), np.ndarray)
    assert seen == ["meta", "meta"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numpy_in_and_out_of_a_gpu():
    image, unary = small_problem()
    np.testing.assert_allclose(DenseCRF(4).cuda()(image, unary), DenseCRF(4)(image, unary), atol=1e-4)
