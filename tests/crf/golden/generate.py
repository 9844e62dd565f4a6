"""How pydensecrf_24x32_L3.npz was made: `python tests/crf/golden/generate.py`, with pydensecrf2 1.1 on NumPy 2.4.6.

pydensecrf2 packages Kraehenbuehl's own C++ (github.com/lucasb-eyer/pydensecrf). Nothing here imports instseg.

    image                    (24, 32, 3) uint8: a bright disc and a dark bar on a ramp, with noise
    unary_energy             (3, 24, 32) float32, energies that know the labels roughly
    <theta>_<norm>_it<T>     (3, 24, 32) float32 marginals after T iterations; Potts, weights 3 (spatial) and
                             10 (bilateral), p80: theta_alpha 80, theta_beta 13, theta_gamma 3; p160: 160, 3, 3
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydensecrf.densecrf as reference  # pyright: ignore[reportMissingImports]

HEIGHT, WIDTH, LABELS = 24, 32, 3
THETAS = {"p80": (80, 13, 3), "p160": (160, 3, 3)}
NORMALIZATIONS = {"symmetric": reference.NORMALIZE_SYMMETRIC, "after": reference.NORMALIZE_AFTER}


def scene() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    labels = np.where((y - 11) ** 2 + (x - 10) ** 2 < 50, 1, np.where((x > 20) & (x < 27), 2, 0))
    ramp = np.stack([60 + 2 * x, 90 + y, 120 - x], 2)
    colors = np.where(labels[..., None] == 0, ramp, np.array([[0, 0, 0], [230, 200, 90], [30, 40, 60]])[labels])
    image = np.clip(colors + generator.normal(0, 6, colors.shape), 0, 255).astype(np.uint8)
    unary = generator.normal(0, 1, (LABELS, HEIGHT, WIDTH)) - 1.5 * (labels == np.arange(LABELS)[:, None, None])
    return image, unary.astype(np.float32)


def marginals(image: np.ndarray, unary: np.ndarray, theta: str, normalization: str, num_iterations: int) -> np.ndarray:
    alpha, beta, gamma = THETAS[theta]
    kind = NORMALIZATIONS[normalization]
    crf = reference.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    crf.setUnaryEnergy(unary.reshape(LABELS, -1))
    crf.addPairwiseGaussian(sxy=gamma, compat=3, normalization=kind)
    crf.addPairwiseBilateral(sxy=alpha, srgb=beta, rgbim=image, compat=10, normalization=kind)
    return np.array(crf.inference(num_iterations)).reshape(unary.shape)


if __name__ == "__main__":
    image, unary = scene()
    arrays = {
        f"{theta}_{normalization}_it{num_iterations}": marginals(image, unary, theta, normalization, num_iterations)
        for theta in THETAS
        for normalization in NORMALIZATIONS
        for num_iterations in (1, 10)
    }
    target = Path(__file__).with_name(f"pydensecrf_{HEIGHT}x{WIDTH}_L{LABELS}.npz")
    np.savez_compressed(target, image=image, unary_energy=unary, **arrays)  # pyright: ignore[reportArgumentType]
