"""Processes are killed at random moments; then the same command gives what an undisturbed run gives.

INSTSEG_NUM_KILLS=20 kills as many; by default a few are, because each costs seconds. INSTSEG_KILL_PLACE says where:
"disk", by default, on one CPU; "s3", the same with all files in an object store; "nodes", on two nodes that share it.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray

from instseg.config import PredictConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.synthetic import write_synthetic_devkit
from instseg.jobs.predict import predict
from instseg.storage import StoragePath
from tests.conftest import REPOSITORY
from tests.jobs import prepare_with_actor
from tests.jobs.nodes import LOOPBACK, two_nodes

psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
NUM_KILLS, PLACE = int(os.environ.get("INSTSEG_NUM_KILLS", "3")), os.environ.get("INSTSEG_KILL_PLACE", "disk")
NUM_IMAGES, SEED = 40, 0
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900 + 300 * NUM_KILLS),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]


@dataclass(frozen=True)
class Site:
    """Where a preparation runs: the root of its files, a folder for the log, CPUs (0: those of a cluster)."""

    root: StoragePath
    folder: Path
    num_cpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    raylets: tuple[int, ...] = ()  # of that cluster; another one is the driver's child

    def start(self, out: StoragePath) -> subprocess.Popen[str]:
        options = [str(self.root / "devkit"), str(out), str(self.num_cpus)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | self.environment
        with (self.folder / f"{out.name}.log").open("a") as log:
            command = [sys.executable, prepare_with_actor.__file__, *options]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("disk")
    write_synthetic_devkit(str(folder / "devkit"), NUM_IMAGES, 1, seed=5, size=(64, 96))
    return Site(StoragePath.of(folder), folder)


@pytest.fixture(scope="module")
def site(disk: Site, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The one that the environment names."""
    assert PLACE in ("disk", "s3", "nodes"), f"INSTSEG_KILL_PLACE={PLACE}"
    if PLACE == "disk":
        yield disk
        return
    root, folder = StoragePath.of(request.getfixturevalue("s3")("kills")) / "root", tmp_path_factory.mktemp("nodes")
    for path in (path for path in (disk.folder / "devkit").rglob("*") if path.is_file()):
        (root / path.relative_to(disk.folder).as_posix()).publish_file(path)
    if PLACE == "s3":
        yield Site(root, folder)
        return
    for name in ("head", "node"):
        (folder / name).mkdir()
    with two_nodes(folder, num_gpus=1) as cluster:
        raylets = tuple(node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes())
        yield Site(root, folder, 0, LOOPBACK | {"RAY_ADDRESS": str(cluster.address)}, raylets)


def victims(driver: subprocess.Popen[str], raylets: Sequence[int] = ()) -> dict[str, list[Any]]:
    """Whom to kill: the driver, a worker at a task, an actor; those that there are, and of no other cluster."""
    found: dict[str, list[Any]] = {"driver": [psutil.Process(driver.pid)]}
    for pid in (driver.pid, *raylets):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                title = " ".join(process.cmdline())
                if title.startswith("ray::MapWorker"):
                    found.setdefault("actor", []).append(process)
                elif re.match("ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)", title):  # a raylet ends with its agents
                    found.setdefault("worker", []).append(process)
    return found


def shards(out: StoragePath) -> set[str]:
    """The files of shards, complete or not; on disk without a look at them, as they come and go."""
    names = out.files() if out.local is None else os.listdir(out.local) if out.is_folder() else []
    return {name for name in names if name.startswith("shard-")}


def wait_for_progress(process: subprocess.Popen[str], out: StoragePath, num_files: int) -> bool:
    """Wait until there are more files in `out`; whether the driver is still at work."""
    while process.poll() is None and len(shards(out)) <= num_files:
        time.sleep(0.02)
    return process.poll() is None


def content(out: StoragePath) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in out.files()}


def times(out: StoragePath) -> dict[str, int]:
    """When the shards that are complete were written."""
    filesystem, path = out.filesystem
    complete = sorted(name.removesuffix(".json") for name in shards(out) if name.endswith(".json"))
    return {name: filesystem.get_file_info(f"{path}/{name}.parquet").mtime_ns for name in complete}


def test_whoever_is_killed_every_image_is_there_once(disk: Site, site: Site) -> None:
    rng, undisturbed, out = random.Random(SEED), disk.root / "undisturbed", site.root / "out"
    assert disk.start(undisturbed).wait() == 0
    expected = content(undisturbed)
    killed: list[str] = []
    redone, finished = 0, {}
    while len(killed) < NUM_KILLS:
        out.delete_folder()  # from the start again: there are more kills than one run has room for
        redone, finished = redone + 1, {}
        while True:
            process = site.start(out)
            killed += kill_at_random(process, site, out, rng, NUM_KILLS - len(killed))
            if process.wait() == 0:
                break
            assert process.returncode == -signal.SIGKILL, (site.folder / "out.log").read_text()  # not over a worker
            assert {name: time for name, time in times(out).items() if name in finished} == finished
            finished = times(out)
        assert content(out) == expected
        assert {name: times(out)[name] for name in finished} == finished
    assert len(killed) == NUM_KILLS
    print(f"killed {sorted(killed)} in {redone} runs")
    dataset = PreparedDataset(out)
    assert len(set(dataset.image_ids)) == len(dataset) == NUM_IMAGES


def kill_at_random(
    process: subprocess.Popen[str], site: Site, out: StoragePath, rng: random.Random, at_most: int
) -> list[str]:
    """Kill somebody after each of a few steps forward, until the driver is dead or done; who was killed."""
    killed = []
    while len(killed) < at_most and wait_for_progress(process, out, len(shards(out)) + rng.randrange(3)):
        time.sleep(rng.uniform(0, 0.3))  # somewhere in the work on a shard
        try:
            kind, processes = rng.choice(sorted(victims(process, site.raylets).items(), key=lambda each: each[0]))
            rng.choice(processes).kill()
        except psutil.Error:
            continue  # it had ended
        killed.append(kind)
        if kind == "driver":
            break
    return killed


@pytest.mark.usefixtures("ray_cluster")  # where the undisturbed run is
def test_predictions_are_there_once_too(disk: Site) -> None:
    """A worker is killed, which the run survives, then the driver; the same command does what is missing."""
    inputs, out, undisturbed = disk.folder / "devkit", disk.folder / "masks", disk.folder / "undisturbed_masks"
    names = {"images": "JPEGImages", "classes": "classes.txt", "detections": "detections.json", "logits": "logits"}
    options = {name: str(inputs / file) for name, file in names.items()}

    def start() -> subprocess.Popen[str]:
        words = [f"--{name}={value}" for name, value in options.items()]
        with (disk.folder / "masks.log").open("a") as log:
            command = [sys.executable, str(REPOSITORY / "workflows" / "predict.py"), *words, f"--out={out}"]
            return subprocess.Popen([*command, "--shard-size=2"], stdout=log, stderr=log, text=True)

    process, parts = start(), StoragePath.of(out / "shards")
    for kind in ("worker", "driver"):
        assert wait_for_progress(process, parts, len(shards(parts))), (disk.folder / "masks.log").read_text()
        while not (found := victims(process).get(kind)):
            assert process.poll() is None
        random.Random(SEED).choice(found).kill()
    assert process.wait() == -signal.SIGKILL
    finished = times(parts)
    assert 0 < len(finished) < NUM_IMAGES // 2
    assert start().wait() == 0, (disk.folder / "masks.log").read_text()
    assert {name: times(parts)[name] for name in finished} == finished
    predict(PredictConfig(str(undisturbed), **options, shard_size=2))  # pyright: ignore
    expected = {path.relative_to(undisturbed): path.read_bytes() for path in undisturbed.rglob("*.*")}
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")} == expected
    assert len(json.loads((out / "images.json").read_text())["images"]) == NUM_IMAGES + 1
