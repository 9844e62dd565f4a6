#!/usr/bin/env python
"""Time, memory and exactness of the dense CRF, beside pydensecrf where it is (pip install cython pydensecrf2).

Inference is 10 iterations with lattice construction; training is forward and backward of 5 iterations. Ours and the
peer's alternate in one run; the peer has one thread and no more.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
import numpy as np
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common import RESULTS, alternate, write_result
from instseg.config import Accuracy, InstanceCrfConfig, KernelConfig, Normalization
from instseg.crf import DenseCRF, InstanceCRF
from instseg.crf.pairwise import build_kernels
from instseg.lattice import pixel_major

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PHOTOGRAPH = SHARED / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2008_000223.jpg"
THETAS = {"80/13/3": (80.0, 13.0, 3.0), "160/3/3": (160.0, 3.0, 3.0)}
CASES = [(500, 375, 21), (1024, 1024, 21), (500, 375, 2), (500, 375, 6), (500, 375, 51)]  # width, height, labels
ACCURACIES: tuple[Accuracy, ...] = ("fast", "ring", "exact")
ROUNDS = 5


def main() -> None:
    """Print the tables, write results/crf.json, crf_scaling.json and crf_scaling.png."""
    print(f"{'case':28s}{'vertices':>9s}" + "".join(f"{name:>24s}" for name in ("1 thread", "2 threads", "training")))
    timings = {f"{w}x{h} L{n} {theta}": time_case(w, h, n, theta) for w, h, n in CASES for theta in THETAS}
    content = {
        "image": PHOTOGRAPH.name if PHOTOGRAPH.is_file() else "generated",
        "rounds": ROUNDS,
        "timings": timings,
        "peak_mib": {f"{w}x{h} L{n} {theta}": peaks(w, h, n, theta) for w, h, n in CASES[:2] for theta in THETAS},
        "accuracies": {theta: time_accuracies(theta) for theta in THETAS},
        "exactness": exactness(),
        "ragged": time_ragged("cpu"),
    }
    if torch.cuda.is_available():
        content |= {"gpu": time_gpu(), "gpu_ragged": time_ragged("cuda"), "gpu_name": torch.cuda.get_device_name()}
    print(f"\nwritten to {write_result('crf', content)}, {write_result('crf_scaling', scaling())}")


def problem(width: int, height: int, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph, or a smooth image where there is none, and random unaries (L, H, W) float32."""
    generator = np.random.default_rng(0)
    unary = generator.normal(0, 2, (num_labels, height, width)).astype(np.float32)
    if PHOTOGRAPH.is_file():
        from PIL import Image

        return np.array(Image.open(PHOTOGRAPH).convert("RGB").resize((width, height))), unary
    coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 4, 5)))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + generator.normal(0, 1, smooth.shape), 0, 255).astype(np.uint8), unary


def candidates(width: int, height: int, num_labels: int, theta: str) -> dict[str, Callable[[], Any]]:
    """What is timed on one case."""
    image, unary = problem(width, height, num_labels)
    kernels = KernelConfig(*THETAS[theta])
    crf, short = (DenseCRF(num_labels, kernels, 3.0, 10.0, num_iterations) for num_iterations in (10, 5))

    def on_threads(num_threads: int, run: Callable[[], Any]) -> Any:
        torch.set_num_threads(num_threads)
        return run()

    runs = {
        "1 thread": partial(on_threads, 1, partial(crf, image, unary)),
        "2 threads": partial(on_threads, 2, partial(crf, image, unary)),
        "forward": partial(on_threads, 2, partial(short, image, unary)),
        "training": partial(on_threads, 2, partial(_train_step, short, *map(torch.from_numpy, (image, unary)))),
    }
    peer = _pydensecrf(image, unary, theta)
    return runs if peer is None else runs | {"pydensecrf": peer}


def time_case(width: int, height: int, num_labels: int, theta: str) -> dict[str, Any]:
    """Print and return one row: medians, spreads, and the ratios to the peer of the same round."""
    times = alternate(candidates(width, height, num_labels, theta), ROUNDS)
    image, _ = problem(width, height, 1)
    num_vertices = build_kernels(torch.from_numpy(image), KernelConfig(*THETAS[theta])).kernels[-1].stop  # pyright: ignore
    print(f"{width}x{height} L{num_labels} {theta:10s}".ljust(28) + f"{num_vertices:9d}", end="")
    for name in ("1 thread", "2 threads", "training"):
        ratio = times[name].get("pydensecrf_ratio")
        suffix = "" if ratio is None else f" ({ratio['min']:.2f} {ratio['median']:.2f} {ratio['max']:.2f})"
        print(f"{times[name]['median_ms']:7.0f} ms{suffix:>17s}", end="", flush=True)
    print()
    return {"vertices": num_vertices} | times


def peaks(width: int, height: int, num_labels: int, theta: str) -> dict[str, float]:
    """MiB by which one call raises the process's peak memory, in a process of its own that has its imports done."""
    found = {}
    for name in ("2 threads", "training", "pydensecrf"):
        command = [sys.executable, __file__, "--peak", json.dumps([width, height, num_labels, theta, name])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        if done.stdout:
            found[name] = float(done.stdout)
    print(f"{width}x{height} L{num_labels} {theta:10s}".ljust(28), {k: f"{v:.0f} MiB" for k, v in found.items()})
    return found


def print_peak(width: int, height: int, num_labels: int, theta: str, name: str) -> None:
    """For `peaks`: the rise of VmHWM above the memory in use before the call."""
    run = candidates(width, height, num_labels, theta).get(name)
    if run is None:
        return
    small = candidates(32, 24, num_labels, theta)[name]
    small()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def time_accuracies(theta: str) -> dict[str, Any]:
    """10 iterations with 21 labels on 2 threads: "fast" and "ring" on 500x375, all three on 120x90."""
    torch.set_num_threads(2)
    found: dict[str, Any] = {}
    for width, height, accuracies in ((500, 375, ACCURACIES[:2]), (120, 90, ACCURACIES)):
        image, unary = problem(width, height, 21)
        runs = {
            a: partial(DenseCRF(21, KernelConfig(*THETAS[theta], accuracy=a), 3.0, 10.0, 10), image, unary)
            for a in accuracies
        }
        found[f"{width}x{height}"] = {name: time["median_ms"] for name, time in alternate(runs, 3).items()}
    print(f"accuracies, theta {theta}: {found}")
    return found


def exactness() -> dict[str, Any]:
    """Mean error of the marginals and argmax agreement with brute force, on the golden case of 60x80 with 4 labels."""
    golden = SHARED / "golden" / "crf_60x80_L4.npz"
    if not golden.is_file():
        return {}
    with np.load(golden) as arrays:
        case = dict(arrays)
    rows: dict[str, Any] = {}
    for name, theta in {"p80": "80/13/3", "p160": "160/3/3"}.items():
        normalizations: dict[str, Normalization] = {"sym": "symmetric", "after": "after"}
        for short, normalization in normalizations.items():
            exact = case[f"exact_{name}_{short}_it10"]
            results = {"pydensecrf": case[f"pydensecrf_{name}_{short}_it10"]}
            for accuracy in ACCURACIES:
                kernels = KernelConfig(*THETAS[theta], normalization=normalization, accuracy=accuracy)
                results[accuracy] = DenseCRF(4, kernels, 3.0, 10.0, 10)(case["image"], case["unary_energy"])
            rows[f"{theta} {normalization}"] = {
                key: {
                    "mean_error": float(np.abs(q - exact).mean()),
                    "argmax_agreement": float((q.argmax(0) == exact.argmax(0)).mean()),
                }
                for key, q in results.items()
            }
            cells = (
                f"{k} {v['mean_error']:.1e} {v['argmax_agreement']:.2%}" for k, v in list(rows.values())[-1].items()
            )
            print(f"{theta} {normalization:10s}", *cells, sep="   ")
    return rows


def time_ragged(device: str) -> dict[str, Any]:
    """Instance CRFs of 16 images of different sizes with 0 to 30 detections, beside as many pixels times labels evenly.

    The even batch has 16 labels, the mean of the other.
    """
    torch.set_num_threads(2)
    generator = np.random.default_rng(0)
    counts = [2 * index + 1 for index in range(16)]  # labels, background included
    sizes = [(int(h), int(w)) for h, w in zip(*generator.integers(150, 400, (2, 16)), strict=True)]
    ragged = [(*size, labels) for size, labels in zip(sizes, counts, strict=True)]
    total = sum(h * w * labels for h, w, labels in ragged)
    side = round((total / 256) ** 0.5)
    crf = InstanceCRF(InstanceCrfConfig()).to(device).requires_grad_(False)
    runs = {}
    for name, shapes in {"even": [(side, side, 16)] * 16, "ragged": ragged}.items():
        images = [torch.from_numpy(problem(w, h, 1)[0]).float().to(device) for h, w, _ in shapes]
        values = [torch.randn(h * w, n, device=device).mul_(2).log_softmax(1).neg() for h, w, n in shapes]
        runs[name] = partial(_synchronized, partial(crf.batch, images, values))
    times = alternate(runs, ROUNDS)
    ratio = times["ragged"]["median_ms"] / times["even"]["median_ms"]
    print(f"16 instance CRFs, {device}: {times['even']['median_ms']:.0f} ms evenly, ragged {ratio:.2f} times that")
    return times | {"ratio": ratio}


def time_gpu() -> dict[str, Any]:
    """The lattice alone, 10 iterations on it, and forward and backward of 5 with lattice construction, in ms."""
    found = {}
    for (width, height, num_labels), theta in product(CASES, THETAS):
        image, unary = (torch.from_numpy(array).cuda() for array in problem(width, height, num_labels))
        crf, short = (DenseCRF(num_labels, KernelConfig(*THETAS[theta]), 3.0, 10.0, n).cuda() for n in (10, 5))
        build = partial(build_kernels, image, crf.kernel_config)
        term, rows = crf.pairwise(build()), pixel_major(unary)
        infer = torch.no_grad()(partial(term.kernels.infer, rows, term.matrices, 10, normalize=True))
        train = partial(_train_step, short, image, unary)
        runs = {"lattice": build, "10 iterations": infer, "training": train}
        times = alternate({name: partial(_synchronized, run) for name, run in runs.items()}, ROUNDS)
        found[f"{width}x{height} L{num_labels} {theta}"] = times
        print(
            f"GPU {width}x{height} L{num_labels} {theta}", *(f"{n} {t['median_ms']:.2f} ms" for n, t in times.items())
        )
    return found


def _synchronized(run: Callable[[], Any]) -> None:
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def scaling() -> dict[str, Any]:
    """Time against pixels and labels, with the plot."""
    theta = "80/13/3"
    sizes = [(250, 188), (354, 265), (500, 375), (707, 530), (1000, 750)]
    counts = [2, 8, 16, 24, 32, 48, 64]
    pixels = {w * h: _median(w, h, 21, theta) for w, h in sizes}
    labels = {count: _median(500, 375, count, theta) for count in counts}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    thousands = {count / 1000: time for count, time in pixels.items()}
    names = "thousand pixels (21 labels)", "labels (500 x 375 pixels)"
    for axis, points, label in zip(axes, (thousands, labels), names, strict=True):
        axis.plot(list(points), list(points.values()), "o-", color="tab:blue")
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms, 10 iterations, 2 threads")
    figure.savefig(RESULTS / "crf_scaling.png", dpi=110)
    return {"pixels_ms": pixels, "labels_ms": labels}


def _median(width: int, height: int, num_labels: int, theta: str) -> float:
    run = candidates(width, height, num_labels, theta)["2 threads"]
    return alternate({"ours": run}, 5)["ours"]["median_ms"]


def _train_step(crf: DenseCRF, image: torch.Tensor, unary: torch.Tensor) -> None:
    crf.zero_grad()
    crf(image, unary.detach().requires_grad_()).square().mean().backward()


def _pydensecrf(image: np.ndarray, unary: np.ndarray, theta: str) -> Callable[[], np.ndarray] | None:
    try:
        import pydensecrf.densecrf as peer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    num_labels, height, width = unary.shape
    alpha, beta, gamma = THETAS[theta]

    def run() -> np.ndarray:
        crf = peer.DenseCRF2D(width, height, num_labels)
        crf.setUnaryEnergy(unary.reshape(num_labels, -1))
        crf.addPairwiseGaussian(sxy=gamma, compat=3)
        crf.addPairwiseBilateral(sxy=alpha, srgb=beta, rgbim=image, compat=10)
        return np.array(crf.inference(10))

    return run


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print_peak(*json.loads(sys.argv[-1]))
    else:
        main()
