#!/usr/bin/env python
"""Time and exactness of the dense CRF, beside pydensecrf where it is installed (pip install pydensecrf2)."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import alternate, write_result
from instseg.config import KernelConfig
from instseg.crf import DenseCRF

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "golden"
SIZES = {"500x375": (375, 500), "1024x1024": (1024, 1024)}
THETAS = {"80/13/3": (80.0, 13.0, 3.0), "160/3/3": (160.0, 3.0, 3.0)}
NUM_LABELS, NUM_ITERATIONS = 21, 10


def main(rounds: int = 5) -> None:
    """Print both tables and write results/crf.json."""
    timings: dict[str, Any] = {}
    for size_name, size in SIZES.items():
        for theta_name, theta in THETAS.items():
            timings[f"{size_name} theta {theta_name}"] = time_one(size, theta, rounds)
    exactness = {} if not GOLDEN.is_dir() else measure_exactness()
    content = {"threads": torch.get_num_threads(), "rounds": rounds, "timings": timings, "exactness": exactness}
    print(f"\nwritten to {write_result('crf', content)}")


def time_one(size: tuple[int, int], theta: tuple[float, float, float], rounds: int) -> dict[str, Any]:
    """Inference with lattice construction, and forward + backward of half as many iterations."""
    image, unary = textured_image(*size)
    crf = DenseCRF(NUM_LABELS, KernelConfig(*theta), 3.0, 10.0, NUM_ITERATIONS)
    short = DenseCRF(NUM_LABELS, KernelConfig(*theta), 3.0, 10.0, NUM_ITERATIONS // 2)
    candidates = {
        "instseg": partial(crf, image, unary),
        "forward_backward_5": partial(_train_step, short, image, unary),
    }
    peer = _pydensecrf(image, unary, theta)
    if peer is not None:
        candidates["pydensecrf"] = peer
    times = alternate(candidates, rounds)
    for name, time in times.items():
        spread = f"{time['min_ms']:.0f}..{time['max_ms']:.0f}"
        print(f"{size[1]}x{size[0]}  theta {theta}  {name:20s} {time['median_ms']:8.0f} ms  ({spread})", flush=True)
    return times


def textured_image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image with noise, uint8, and unaries (L, H, W) float32; seeded."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 12, 16)))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    image = np.clip(smooth + generator.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    return image, generator.normal(0, 2, (NUM_LABELS, height, width)).astype(np.float32)


def measure_exactness() -> dict[str, Any]:
    """Mean marginal error and argmax agreement against brute force, ours and pydensecrf's, on the golden case."""
    with np.load(GOLDEN / "crf_60x80_L4.npz") as arrays:
        case = dict(arrays)
    rows: dict[str, Any] = {}
    for theta_name, theta in {"p80": THETAS["80/13/3"], "p160": THETAS["160/3/3"]}.items():
        for short, normalization in {"sym": "symmetric", "after": "after"}.items():
            kernels = KernelConfig(*theta, normalization=normalization)  # pyright: ignore[reportArgumentType]
            ours = DenseCRF(4, kernels, 3.0, 10.0, NUM_ITERATIONS)(case["image"], case["unary_energy"])
            exact, peer = (case[f"{kind}_{theta_name}_{short}_it10"] for kind in ("exact", "pydensecrf"))
            rows[f"{theta_name} {normalization}"] = {
                name: {
                    "mean_error": float(np.abs(q - exact).mean()),
                    "argmax_agreement": float((q.argmax(0) == exact.argmax(0)).mean()),
                    "max_difference_to_pydensecrf": float(np.abs(q - peer).max()),
                }
                for name, q in (("instseg", ours), ("pydensecrf", peer))
            }
            print(theta_name, normalization, rows[f"{theta_name} {normalization}"])
    return rows


def _train_step(crf: DenseCRF, image: np.ndarray, unary: np.ndarray) -> None:
    crf.zero_grad()
    crf(torch.from_numpy(image), torch.from_numpy(unary)).square().mean().backward()


def _pydensecrf(image: np.ndarray, unary: np.ndarray, theta: tuple[float, float, float]) -> Any:
    try:
        import pydensecrf.densecrf as peer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    flat = np.ascontiguousarray(unary.reshape(NUM_LABELS, -1))

    def run() -> np.ndarray:
        crf = peer.DenseCRF2D(image.shape[1], image.shape[0], NUM_LABELS)
        crf.setUnaryEnergy(flat)
        crf.addPairwiseGaussian(sxy=theta[2], compat=3)
        crf.addPairwiseBilateral(sxy=theta[0], srgb=theta[1], rgbim=image, compat=10)
        return np.array(crf.inference(NUM_ITERATIONS))

    return run


if __name__ == "__main__":
    main()
