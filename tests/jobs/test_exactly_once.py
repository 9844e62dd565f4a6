"""Processes are killed at random moments; then the same command gives what an undisturbed run gives.

INSTSEG_NUM_KILLS=20 kills as many; by default a few are, because each costs seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray

from instseg.data.dataset import PreparedDataset
from instseg.data.synthetic import write_synthetic_devkit
from tests.conftest import REPOSITORY
from tests.jobs import prepare_with_actor

psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
pytestmark = pytest.mark.ray
NUM_KILLS = int(os.environ.get("INSTSEG_NUM_KILLS", "3"))
NUM_IMAGES, SEED = 40, 0


def start(devkit: Path, out: Path, num_cpus: int) -> subprocess.Popen[str]:
    command = [sys.executable, prepare_with_actor.__file__, str(devkit), str(out), str(num_cpus)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


def victims(driver: Any) -> dict[str, Any]:
    """Whom to kill: the driver, a worker at a task, the actor; those that there are."""
    found = {"driver": driver}
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::MapWorker"):
            found["actor"] = process
        elif title.startswith("ray::") and not title.startswith("ray::IDLE"):
            found["worker"] = process
    return found


def wait_for_progress(process: subprocess.Popen[str], out: Path, num_files: int) -> bool:
    """Wait until there are more files in `out`; whether the driver is still at work."""
    while process.poll() is None and len(list(out.glob("shard-*"))) <= num_files:
        time.sleep(0.02)
    return process.poll() is None


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("devkit")
    write_synthetic_devkit(str(root), NUM_IMAGES, 1, seed=5, size=(64, 96))
    return root


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def times(out: Path) -> dict[str, int]:
    """When the shards that are complete were written."""
    return {path.stem: path.with_suffix(".parquet").stat().st_mtime_ns for path in out.glob("shard-*.json")}


def test_whoever_is_killed_every_image_is_there_once(devkit: Path, tmp_path: Path) -> None:
    rng, out = random.Random(SEED), tmp_path / "out"
    assert start(devkit, tmp_path / "undisturbed", 1).wait(600) == 0
    expected = content(tmp_path / "undisturbed")
    killed: list[str] = []
    redone, finished = 0, {}
    while len(killed) < NUM_KILLS:
        shutil.rmtree(out, ignore_errors=True)  # from the start again: there are more kills than one run has room for
        out.mkdir()
        redone, finished = redone + 1, {}
        while True:
            process = start(devkit, out, 1)
            killed += kill_at_random(process, out, rng, NUM_KILLS - len(killed))
            if process.wait(600) == 0:
                break
            assert {name: time for name, time in times(out).items() if name in finished} == finished
            finished = times(out)
        assert content(out) == expected
        assert {name: times(out)[name] for name in finished} == finished
    assert len(killed) == NUM_KILLS
    print(f"killed {sorted(killed)} in {redone} runs")
    dataset = PreparedDataset(out)
    assert len(set(dataset.image_ids)) == len(dataset) == NUM_IMAGES


def kill_at_random(process: subprocess.Popen[str], out: Path, rng: random.Random, at_most: int) -> list[str]:
    """Kill somebody after each of a few steps forward, until the driver is dead or done; who was killed."""
    killed, driver = [], psutil.Process(process.pid)
    while len(killed) < at_most and wait_for_progress(process, out, len(list(out.glob("shard-*"))) + rng.randrange(3)):
        time.sleep(rng.uniform(0, 0.3))  # somewhere in the work on a shard
        try:
            kind, victim = rng.choice(sorted(victims(driver).items(), key=lambda each: each[0]))
            victim.kill()
        except psutil.Error:
            continue  # it had ended
        killed.append(kind)
        if kind == "driver":
            break
    return killed
