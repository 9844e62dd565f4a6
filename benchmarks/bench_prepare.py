#!/usr/bin/env python
"""What preparing costs: each stage, one and two CPUs, Ray beside a plain process pool, GrabCut, and 100,000 images.

Stages and scaling take photographs of the devkit that is named (or generated scenes of VOC's size), with the detections
and logits beside it, and the first of these again as SBD has them, and COCO's samples; the networks have random
weights, which cost what trained ones do. The 100,000 images are a few
small scenes under as many names. GrabCut's settings are tried on all photographs of the devkit's split `train`, beside
the plain loop of OpenCV's tutorial; bench_foregrounds.py says what AP^r makes of them. `--parts` chooses; results of
the others stay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from safetensors.torch import save
from scipy.io import savemat
from scipy.sparse import csc_matrix
from torchvision.models import get_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_foregrounds
from benchmarks.common import RESULTS, write_result
from benchmarks.processes import descendants, memory_mib, name_of
from instseg.config import PrepareConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.manifest import collect_settings
from instseg.data.network_outputs import read_detections
from instseg.data.shards import ShardPlan, ShardTask
from instseg.data.stages import foreground, read, write
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.cluster import cluster
from instseg.jobs.networks import Detect, Segment
from instseg.jobs.prepare import prepare
from instseg.jobs.sources import list_images
from instseg.storage import StoragePath

NUM_IMAGES, SHARD_SIZE, ROUNDS = 48, 4, 3
SCALING_SHARD_SIZE, NUM_WARM_UP = PrepareConfig.shard_size, 32
NETWORKS = {"detect": "fasterrcnn_resnet50_fpn", "segment": "deeplabv3_mobilenet_v3_large"}
NUM_FOR_NETWORKS = 8
PAPER_IMAGES, PAPER_DETECTIONS = {"sbd": 10_582, "coco": 66_099}, 250_000  # SBD's with some of VOC
SCALES = (10_000, 100_000)  # images, small ones
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print what was measured and write results/prepare.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devkit", help="VOC devkit; beside it networks/detections.json and networks/logits")
    names, curve = ("stages", "scaling", "scale", "grabcut"), bench_foregrounds.CURVE
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--settings", nargs="+", default=curve, choices=curve, help="of GrabCut; the others stay")
    options = parser.parse_args()
    path = RESULTS / "prepare.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    again = partial(grabcut, names=options.settings, before=results.get("grabcut", {}).get("curve", {}))
    parts = {"stages": stages, "scaling": scaling, "scale": scale, "grabcut": again}
    with tempfile.TemporaryDirectory() as folder:
        config = _inputs(options.devkit, Path(folder))
        for part in options.parts:
            results[part] = parts[part](config, Path(folder))
            results.pop("provenance", None)
            print(json.dumps({part: results[part]}, indent=1), write_result("prepare", results), flush=True)


def stages(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """CPU seconds for 1,000 images of each stage, in one process: of VOC with the networks, and what others read."""
    source_of = {"voc": config, "sbd": _as_sbd(config, folder / "sbd")} | _coco(config)
    costs, num_detections = {}, 0
    for name, of_source in source_of.items():
        warm, tasks = _plan(of_source, folder / name / "warm")
        _make(warm, tasks[0])  # imports what the stages need
        plan, tasks = _plan(of_source, folder / name / "out")
        costs[name], num_found = _stage_costs(plan, tasks)
        if name == "voc":
            num_detections = num_found
            costs[name] |= _network_costs(config, plan, tasks)
        listing = list_images(of_source)
        start = time.perf_counter()
        collect_settings(of_source, listing, {})
        costs[name]["driver"] = 1000 * (time.perf_counter() - start) / len(listing.items)
    per_detection = costs["voc"]["foreground"] / num_detections * NUM_IMAGES / 1000
    return {
        "cpu_seconds_per_1000_images": costs,
        "detections_per_image": num_detections / NUM_IMAGES,
        "cpu_seconds_per_foreground": per_detection,
        "paper_set_hours": _projection(costs, per_detection),
    }


def _stage_costs(plan: ShardPlan, tasks: list[ShardTask]) -> tuple[dict[str, float], int]:
    """CPU seconds for 1,000 images, and how many detections there were."""
    seconds: Counter[str] = Counter()
    num_images = num_detections = 0
    for task in tasks:
        start = time.process_time()
        draft = read(plan, task)
        middle = time.process_time()
        foreground(plan, draft)
        late = time.process_time()
        report = write(plan, draft)
        seconds.update({"read": middle - start, "foreground": late - middle, "write": time.process_time() - late})
        num_images, num_detections = num_images + len(report.image_ids), num_detections + report.num_detections
    return {stage: 1000 * taken / num_images for stage, taken in seconds.items()}, num_detections


def _as_sbd(config: PrepareConfig, root: Path) -> PrepareConfig:
    """The same photographs in the folders of SBD, with MATLAB files as published: classes, instances, boundaries."""
    assert config.devkit is not None
    devkit = Path(config.devkit)
    for name in ("cls", "inst"):
        (root / name).mkdir(parents=True)
    (root / "img").symlink_to(devkit / "JPEGImages")
    ids = (devkit / "ImageSets/Segmentation/train.txt").read_text().split()
    for name, text in (("train", "\n".join(ids)), ("val", "none")):
        (root / f"{name}.txt").write_text(text)
    for image_id in ids:
        paths = (devkit / f"{name}/{image_id}.png" for name in ("SegmentationClass", "SegmentationObject"))
        semantic, instances = (np.array(Image.open(path)) % 255 for path in paths)  # SBD has no void
        categories = [[semantic[instances == k].max(initial=0)] for k in range(1, instances.max() + 1)]
        bounds = {"cls": _boundaries(semantic, 20), "inst": _boundaries(instances, len(categories))}
        truth = {"Segmentation": semantic, "Boundaries": bounds["cls"], "CategoriesPresent": np.unique(semantic)}
        savemat(root / f"cls/{image_id}.mat", {"GTcls": truth}, do_compression=True)
        truth = {"Segmentation": instances, "Boundaries": bounds["inst"], "Categories": np.array(categories, np.uint8)}
        savemat(root / f"inst/{image_id}.mat", {"GTinst": truth}, do_compression=True)
    return replace(config, devkit=None, sbd=str(root), split="train")


def _boundaries(labels: np.ndarray, num: int) -> np.ndarray:
    """A cell array of sparse matrices: the pixels of each label that touch others."""
    cells = np.empty((num, 1), object)
    for row in range(num):
        mask = (labels == row + 1).astype(np.uint8)
        cells[row, 0] = csc_matrix(mask - cv2.erode(mask, np.ones((3, 3), np.uint8)), dtype=np.float64)
    return cells


def _coco(config: PrepareConfig) -> dict[str, PrepareConfig]:
    """COCO's samples beside the devkit's folder, if there are some; without detections, which depend on VOC's ids."""
    assert config.detections is not None
    root = Path(config.detections).parents[1] / "coco"
    if not root.exists():
        return {}
    annotations = str(root / "annotations/instances_train2017.json")
    none = {"devkit": None, "split": None, "classes": "voc", "detections": None, "logits": None}
    return {"coco": replace(config, coco=annotations, images=str(root / "train2017"), **none)}


def _projection(costs: dict[str, dict[str, float]], per_detection: float) -> dict[str, dict[str, float]]:
    """Hours for the paper's training set on more and more cores: the stages divide, what the driver does not."""
    of_source = {"sbd": costs["sbd"], "coco": costs.get("coco", costs["voc"])}
    per_image = {name: (cost["read"] + cost["write"], cost["driver"]) for name, cost in of_source.items()}
    work = sum(num / 1000 * per_image[name][0] for name, num in PAPER_IMAGES.items()) + PAPER_DETECTIONS * per_detection
    networks = sum(PAPER_IMAGES.values()) / 1000 * sum(cost for stage, cost in costs["voc"].items() if "," in stage)
    serial = sum(num / 1000 * per_image[name][1] for name, num in PAPER_IMAGES.items())
    return {
        str(cores): {
            "imported_outputs": (work / cores + serial) / 3600,
            "networks_on_cpus": ((work + networks) / cores + serial) / 3600,
            "of_which_driver": serial / 3600,
        }
        for cores in (1, 16, 64, 256)
    }


def _network_costs(config: PrepareConfig, plan: ShardPlan, tasks: list[ShardTask]) -> dict[str, float]:
    """CPU seconds for 1,000 images, on one thread."""
    config = replace(config, detections=None, logits=None, detector=NETWORKS["detect"], semantic=NETWORKS["segment"])
    weights = {name: plan.out / f"{name}.safetensors" for name in NETWORKS.values()}
    for name, path in weights.items():
        num_outputs = 91 if name == NETWORKS["detect"] else len(plan.source.classes)
        random = get_model(name, weights=None, weights_backbone=None, num_classes=num_outputs)
        path.publish(save({key: tensor.contiguous() for key, tensor in random.state_dict().items()}))
    detect, segment = (str(weights[name]) for name in NETWORKS.values())
    config = replace(config, detector_weights=detect, semantic_weights=segment)
    drafts = [read(replace(plan, out=StoragePath.of("nowhere")), task).encode() for task in tasks]
    costs = {}
    for name, stage in (("detect", Detect), ("segment", Segment)):
        network = stage(config, plan.source.classes, "cpu")
        network(drafts[0])
        start = time.process_time()
        for draft in drafts[: NUM_FOR_NETWORKS // SHARD_SIZE]:
            network(draft)
        costs[f"{name}, {NETWORKS[name]}"] = 1000 * (time.process_time() - start) / NUM_FOR_NETWORKS
    return costs


def scaling(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Seconds for all photographs on 1 and 2 CPUs, of Ray and of a process pool that does the same, in turn, warm.

    All processes, the driver's and Ray's own too, have these CPUs alone.
    """
    warm_up, config = (replace(config, split=split, shard_size=SCALING_SHARD_SIZE) for split in ("warm", "all"))
    times: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for num_cpus in (1, 2):
            with _on_cpus(num_cpus):
                with _pool(warm_up, num_cpus) as run:
                    _time(times, f"pool_{num_cpus}", lambda n=num_cpus, k=number: run(config, folder / f"pool_{n}_{k}"))
                with cluster():  # on the CPUs that this process may use
                    prepare(replace(warm_up, out=str(folder / f"warm_{num_cpus}_{number}")))
                    out = folder / f"ray_{num_cpus}_{number}"
                    _time(times, f"ray_{num_cpus}", lambda out=out: prepare(replace(config, out=str(out))))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "num_images": len(list_images(config).items),
        "seconds": {name: [min(v), medians[name], max(v)] for name, v in times.items()},
        "ray_efficiency_on_2": _paired(times["ray_1"], times["ray_2"], 2),
        "pool_efficiency_on_2": _paired(times["pool_1"], times["pool_2"], 2),
        "ray_over_pool_1": _paired(times["ray_1"], times["pool_1"], 1),
        "ray_over_pool_2": _paired(times["ray_2"], times["pool_2"], 1),
    }


def _paired(first: list[float], second: list[float], divisor: int) -> list[float]:
    """Least, median and greatest of the rounds' ratios."""
    ratios = sorted(a / b / divisor for a, b in zip(first, second, strict=True))
    return [ratios[0], statistics.median(ratios), ratios[-1]]


@contextmanager
def _on_cpus(num_cpus: int) -> Iterator[None]:
    """Give this process, and those that it starts, so many of its CPUs."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(usable)[:num_cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


@contextmanager
def _pool(warm_up: PrepareConfig, num_processes: int) -> Iterator[Callable[[PrepareConfig, Path], None]]:
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * num_processes))  # all of them start

        def run(config: PrepareConfig, out: Path) -> None:
            plan, tasks = _plan(config, out)
            list(pool.map(_make, [plan] * len(tasks), tasks))

        run(warm_up, Path(tempfile.mkdtemp()))
        yield run


def _make(plan: ShardPlan, task: ShardTask) -> str:
    return write(plan, foreground(plan, read(plan, task))).sha256


def grabcut(
    config: PrepareConfig, folder: Path, names: Sequence[str], before: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The curve of settings, and what the default costs beside the plain loop in one process."""
    out = folder / "grabcut"
    prepare(replace(config, split="all", out=str(out)))
    curve = before | bench_foregrounds.curve(str(out), names)
    plain, default = (curve[name] for name in (bench_foregrounds.PLAIN, bench_foregrounds.DEFAULT))
    ratio = plain["cpu_seconds_per_detection"] / default["cpu_seconds_per_detection"]
    return {"curve": {name: curve[name] for name in bench_foregrounds.CURVE}, "plain_over_default": ratio}


def scale(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Images a second and peak memory of the command and of its processes, for few and for many images."""
    del config
    few = folder / "few"
    write_synthetic_devkit(str(few), num_train=50, num_val=1, seed=0, size=(32, 32))
    results = {}
    for num_images in SCALES:
        out = folder / f"data_{num_images}"
        many, classes = _many(few, folder / f"many_{num_images}", num_images), few / "classes.txt"
        options = {"devkit": many, "split": "train", "classes": classes, "shard-size": 64, "out": out}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / "workflows/prepare.py"), *words])
        peaks = _watch(process)
        seconds = time.perf_counter() - start
        assert process.returncode == 0
        assert len(PreparedDataset(out)) == num_images
        results[str(num_images)] = {"seconds": seconds, "images_per_s": num_images / seconds} | peaks
    first, last = (results[str(num_images)]["driver_peak_mib"] for num_images in (SCALES[0], SCALES[-1]))
    return results | {"driver_kib_per_image": 1024 * (last - first) / (SCALES[-1] - SCALES[0])}


def _many(few: Path, many: Path, num_images: int) -> Path:
    """As many images, which are links to a few."""
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (many / name).mkdir(parents=True)
    ids = [f"image_{index:06d}" for index in range(num_images)]
    (many / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids))
    for index, image_id in enumerate(ids):
        for kind, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png"), ("SegmentationObject", "png")):
            os.link(few / kind / f"scene_{index % 50:05d}.{suffix}", many / kind / f"{image_id}.{suffix}")
    return many


def _watch(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """MiB at most until it ends: of the process, of a worker, and in proportion of all processes below it."""
    peaks = {"driver_peak_mib": 0.0, "worker_peak_mib": 0.0, "all_peak_mib": 0.0}
    while process.poll() is None:
        used = {pid: memory_mib(pid, "smaps_rollup", "Pss") for pid in (process.pid, *descendants(process.pid))}
        workers = [mib for pid, mib in used.items() if name_of(pid).startswith("ray::")]
        now = (used[process.pid], max(workers, default=0.0), sum(used.values()))
        peaks = {name: max(peak, value) for (name, peak), value in zip(peaks.items(), now, strict=True)}
        time.sleep(0.5)
    return peaks


def _time(times: dict[str, list[float]], name: str, run: Callable[[], object]) -> None:
    start = time.perf_counter()
    run()
    times.setdefault(name, []).append(time.perf_counter() - start)


def _plan(config: PrepareConfig, out: Path) -> tuple[ShardPlan, list[ShardTask]]:
    listing = list_images(config)
    records = {} if config.detections is None else read_detections(config.detections)[0]
    logits = None if config.logits is None else StoragePath.of(config.logits)
    plan = ShardPlan(StoragePath.of(out), listing.source, logits, config.min_score, config.grabcut, digest=str(out))
    parts, size = range(0, len(listing.items), config.shard_size), config.shard_size
    tasks = [ShardTask.of(k, listing.items[i : i + size], records) for k, i in enumerate(parts)]
    return plan, tasks


def _inputs(devkit: str | None, folder: Path) -> PrepareConfig:
    """The first photographs of a devkit, or generated scenes; the split "warm" has a few, "all" all."""
    if devkit is None:
        write_synthetic_devkit(
            str(folder / "devkit"), num_train=NUM_IMAGES, num_val=NUM_WARM_UP, seed=0, size=(376, 496)
        )
        root, outputs, classes = folder / "devkit", folder / "devkit", str(folder / "devkit/classes.txt")
        names = root / "ImageSets/Segmentation"
        (names / "val.txt").rename(names / "warm.txt")
        (names / "all.txt").write_bytes((names / "train.txt").read_bytes())
    else:
        found = list_images(PrepareConfig(out="", devkit=devkit, split="train"))
        root, outputs, classes = folder / "devkit", Path(devkit).parent / "networks", None
        names = root / "ImageSets/Segmentation"
        names.mkdir(parents=True)
        for name in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
            (root / name).symlink_to(Path(str(getattr(found.source, "root"))) / name)  # noqa: B009
        ids = [item.image_id for item in found.items]
        (names / "train.txt").write_text("\n".join(ids[:NUM_IMAGES]))
        (names / "warm.txt").write_text("\n".join(ids[-NUM_WARM_UP:]))
        (names / "all.txt").write_text("\n".join(ids))
    return PrepareConfig(
        out="",
        devkit=str(root),
        split="train",
        classes=classes,
        detections=str(outputs / "detections.json"),
        logits=str(outputs / "logits"),
        shard_size=SHARD_SIZE,
    )


if __name__ == "__main__":
    main()
