#!/usr/bin/env python
"""What preparing costs: each stage, one and two CPUs, Ray beside a plain process pool, GrabCut, and 100,000 images.

Stages and scaling take photographs of the devkit that is named (or generated scenes of VOC's size), with the detections
and logits beside it; the networks have random weights, which cost what trained ones do. The 100,000 images are a few
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
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torchvision.models import get_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_foregrounds
from benchmarks.common import RESULTS, write_result
from instseg.config import PrepareConfig
from instseg.data.manifest import collect_settings
from instseg.data.network_outputs import read_detections
from instseg.data.shards import ShardPlan, ShardTask
from instseg.data.stages import foreground, read, write
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.networks import Detect, Segment
from instseg.jobs.prepare import prepare
from instseg.jobs.sources import list_images
from instseg.storage import StoragePath

NUM_IMAGES, SHARD_SIZE, ROUNDS = 48, 4, 3
SCALING_SHARD_SIZE = 8  # of all photographs: enough shards that the last ones do not count, enough work in each
NETWORKS = {"detect": "fasterrcnn_resnet50_fpn", "segment": "deeplabv3_mobilenet_v3_large"}
NUM_FOR_NETWORKS = 8
PAPER_IMAGES, PAPER_DETECTIONS = 10_582 + 66_099, 250_000  # VOC + SBD, COCO
SCALES = (10_000, 30_000, 100_000)  # images, small ones


def main() -> None:
    """Print what was measured and write results/prepare.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devkit", help="VOC devkit; beside it networks/detections.json and networks/logits")
    parts = {"stages": stages, "scaling": scaling, "scale": scale, "grabcut": grabcut}
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    options = parser.parse_args()
    path = RESULTS / "prepare.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        config = _inputs(options.devkit, Path(folder))
        for part in options.parts:
            results[part] = parts[part](config, Path(folder))
            results.pop("provenance", None)
            print(json.dumps({part: results[part]}, indent=1), write_result("prepare", results), flush=True)


def stages(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """CPU seconds for 1,000 images of each stage, in one process."""
    plan, tasks = _plan(config, folder / "stages")
    seconds: Counter[str] = Counter()
    num_detections = 0
    for task in tasks:
        start = time.process_time()
        draft = read(plan, task)
        middle = time.process_time()
        foreground(plan, draft)
        late = time.process_time()
        num_detections += write(plan, draft).num_detections
        seconds.update({"read": middle - start, "foreground": late - middle, "write": time.process_time() - late})
    costs = {stage: 1000 * taken / NUM_IMAGES for stage, taken in seconds.items()}
    costs |= _network_costs(config, plan, tasks)
    start = time.perf_counter()
    collect_settings(config, list_images(config), {})
    costs["driver"] = 1000 * (time.perf_counter() - start) / NUM_IMAGES
    per_detection = seconds["foreground"] / num_detections
    return {
        "cpu_seconds_per_1000_images": costs,
        "detections_per_image": num_detections / NUM_IMAGES,
        "cpu_seconds_per_foreground": per_detection,
        "paper_set_hours": _projection(costs, per_detection),
    }


def _projection(costs: dict[str, float], per_detection: float) -> dict[str, dict[str, float]]:
    """Hours for the paper's training set on more and more cores: the stages divide, what the driver does not."""
    work = PAPER_IMAGES * (costs["read"] + costs["write"]) / 1000 + PAPER_DETECTIONS * per_detection
    networks = PAPER_IMAGES / 1000 * sum(cost for stage, cost in costs.items() if "," in stage)
    serial = PAPER_IMAGES * costs["driver"] / 1000
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
    """Seconds for all photographs with 1 and 2 CPUs, of Ray and of a process pool that does the same, in turn, warm."""
    import ray

    warm_up, config = (replace(config, split=split, shard_size=SCALING_SHARD_SIZE) for split in ("warm", "all"))
    times: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for num_cpus in (1, 2):
            with _pool(warm_up, num_cpus) as run:
                _time(times, f"pool_{num_cpus}", lambda n=num_cpus, k=number: run(config, folder / f"pool_{n}_{k}"))
            ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
            try:
                prepare(replace(warm_up, out=str(folder / f"warm_{num_cpus}_{number}")))
                out = folder / f"ray_{num_cpus}_{number}"
                _time(times, f"ray_{num_cpus}", lambda out=out: prepare(replace(config, out=str(out))))
            finally:
                ray.shutdown()
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


def grabcut(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """The curve of settings, what the default costs beside the plain loop in one process, and how it divides by two."""
    out = folder / "grabcut"
    prepare(replace(config, split="all", out=str(out)))
    curve = bench_foregrounds.curve(str(out))
    plain, default = (curve[name] for name in (bench_foregrounds.PLAIN, bench_foregrounds.DEFAULT))
    ratio = plain["cpu_seconds_per_detection"] / default["cpu_seconds_per_detection"]
    return {"curve": curve, "plain_over_default": ratio}


def scale(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Images a second and peak memory of the driver and of all of Ray, for more and more images."""
    del config
    few = folder / "few"
    write_synthetic_devkit(str(few), num_train=50, num_val=1, seed=0, size=(32, 32))
    results = {}
    for num_images in SCALES:
        many = _many(few, folder / f"many_{num_images}", num_images)
        inputs = PrepareConfig(
            out=str(folder / f"data_{num_images}"),
            devkit=str(many),
            split="train",
            classes=str(few / "classes.txt"),
            shard_size=64,
        )
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe()
        process = context.Process(target=_measure_scale, args=(inputs, sender))
        process.start()
        results[str(num_images)] = receiver.recv() | {"num_images": num_images}
        process.join()
    first, last = results[str(SCALES[0])], results[str(SCALES[-1])]
    grown = last["driver_peak_mib"] - first["driver_peak_mib"]
    return results | {"driver_kib_per_image": 1024 * grown / (SCALES[-1] - SCALES[0])}


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


def _measure_scale(config: PrepareConfig, sender: Any) -> None:
    """In a process of its own, so that its peak is of this run alone."""
    done, peaks = threading.Event(), Counter[str]()
    watcher = threading.Thread(target=_watch, args=(done, peaks))
    watcher.start()
    start = time.perf_counter()
    dataset = prepare(config)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert len(dataset) == dataset.manifest["num_images"]
    status = Path("/proc/self/status").read_text()  # getrusage has the peak of the process that started this one
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    sender.send(
        {
            "seconds": seconds,
            "images_per_s": len(dataset) / seconds,
            "driver_peak_mib": peak,
            "worker_peak_mib": peaks["worker"] / 2**20,
            "all_peak_mib": peaks["all"] / 2**20,
        }
    )


def _watch(done: threading.Event, peaks: Counter[str]) -> None:
    """The greatest worker, and the proportional memory of this process and all below it."""
    import ray

    psutil = import_module("psutil", ray.__name__)
    while not done.wait(1.0):
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                used, title = process.memory_full_info().pss, " ".join(process.cmdline())
            except psutil.Error:
                continue
            total += used
            if title.startswith("ray::"):
                peaks["worker"] = max(peaks["worker"], used)
        peaks["all"] = max(peaks["all"], total)


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
            str(folder / "devkit"), num_train=NUM_IMAGES, num_val=4 * SCALING_SHARD_SIZE, seed=0, size=(376, 496)
        )
        root, outputs, classes = folder / "devkit", folder / "devkit", str(folder / "devkit/classes.txt")
        names = root / "ImageSets/Segmentation"
        (names / "val.txt").rename(names / "warm.txt")
        (names / "all.txt").write_bytes((names / "train.txt").read_bytes())
    else:
        found = list_images(PrepareConfig(out="", devkit=devkit, split="train"))
        root, outputs, classes = folder / "devkit", Path(devkit).parent / "networks", None
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        for name in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
            (root / name).symlink_to(Path(str(getattr(found.source, "root"))) / name)  # noqa: B009
        ids = [item.image_id for item in found.items]
        (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:NUM_IMAGES]))
        (root / "ImageSets/Segmentation/warm.txt").write_text("\n".join(ids[-4 * SCALING_SHARD_SIZE :]))
        (root / "ImageSets/Segmentation/all.txt").write_text("\n".join(ids))
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
