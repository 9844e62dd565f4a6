"""Two Ray nodes that share an object store and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from ray.cluster_utils import Cluster

from instseg.models.checkpoint import find_checkpoint
from instseg.storage import StoragePath
from tests.jobs import all_workflows
from tests.jobs.nodes import LOOPBACK, two_nodes
from tests.s3 import S3

psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
pytestmark = [pytest.mark.ray, pytest.mark.timeout(3000)]  # six minutes on an idle machine
REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "workflows" / "train.py")
# Ray Train asks for the workers that there were, and for what is left of them after this many seconds.
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a working folder for each node and for the driver."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("head", "node", "driver"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path, s3: S3) -> Iterator[Cluster]:
    with two_nodes(folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def roots(folder: Path, s3: S3, devkit: Path) -> tuple[StoragePath, StoragePath]:
    """In the object store and on disk, with the same devkit."""
    roots = StoragePath.of(s3("nodes")) / "root", StoragePath.of(f"file://{folder}/root")
    for path in (path for path in devkit.rglob("*") if path.is_file()):
        for root in roots:
            (root / "devkit" / path.relative_to(devkit).as_posix()).publish_file(path)
    return roots


def run(cluster: Cluster, folder: Path, script: str, *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of a driver on the head."""
    environment = os.environ | LOOPBACK | ENVIRONMENT | {"RAY_ADDRESS": str(cluster.address)}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, cwd=folder / "driver", env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr[-3000:]


class Victim(NamedTuple):
    """The first process of that name that asks for this, once the store has been asked for something else."""

    process: str
    asks: str
    after: str = ""


class Killer:
    """Kills processes of Ray at what they ask the store for; the store does not do it."""

    def __init__(self, s3: S3, victims: Sequence[Victim]) -> None:
        self.s3 = s3
        self.left = list(victims)

    def __call__(self, asked: str, port: int) -> tuple[str, str] | None:
        if not self.left or not re.search(self.left[0].asks, asked):
            return None
        if not any(re.search(self.left[0].after, request) for request in self.s3.requests):
            return None
        with suppress(psutil.Error):  # it may end at any time
            process = psutil.Process(asking(port))
            if self.left[0].process in " ".join(process.cmdline()):
                del self.left[0]
                process.kill()
                return "503 Slow Down", "SlowDown"
        return None


def asking(port: int) -> int:
    """The process at the other end of a connection; this one if that has ended."""
    pids = (each.pid for each in psutil.net_connections("tcp") if each.laddr[1:] == (port,))
    return next(filter(None, pids), os.getpid())


VICTIMS = (
    Victim("ray::", "GET .*/devkit/JPEGImages/scene_00002.jpg"),
    Victim("RayTrainWorker", "PUT .*/run/checkpoints/epoch_0002/manifest.json"),
    Victim("_Evaluator", "GET .*/data/shard-00001.parquet"),
    Victim("_Evaluator", "GET .*/data/shard-00001.parquet", after="PUT .*/ablation/naive/results.json"),
)


def test_all_workflows_with_a_worker_killed_in_each_give_what_folders_give(
    cluster: Cluster, folder: Path, roots: tuple[StoragePath, StoragePath], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(s3, VICTIMS)
    monkeypatch.setattr(s3, "hook", killer)
    status, printed, said = run(cluster, folder, all_workflows.__file__, *map(str, roots))
    assert status == 0, said
    assert not killer.left, "somebody was not killed"
    assert "worker 0 failed" in printed
    stored, on_disk = (content(root) for root in roots)
    assert stored.keys() == on_disk.keys()
    assert len([name for name in stored if name.endswith("records.arrow")]) > 5
    assert [name for name in stored if stored[name] != on_disk[name]] == []
    left = [path.relative_to(folder).parts[:2] for path in folder.rglob("*") if path.is_file()]
    assert {place for place in left if place[0] != "root"} == {("driver", "mlflow.db"), ("driver", "mlartifacts")}


def content(root: StoragePath) -> dict[str, bytes]:
    """The files of all results that say nothing of when, where and how fast, by path."""
    found = {f"data/{name}": (root / "data" / name).read_bytes() for name in (root / "data").files()}
    for epoch in (root / "run" / "checkpoints").folders():
        for name in ("model.safetensors", "optimizer.safetensors"):
            found[f"{epoch}/{name}"] = (root / "run" / "checkpoints" / epoch / name).read_bytes()
    for report in ("report", *(f"ablation/{row}" for row in (root / "ablation").folders())):
        for name in ("records.arrow", "per_class.csv"):
            found[f"{report}/{name}"] = (root / report / name).read_bytes()
    return found | {"ablation.md": (root / "ablation" / "ablation.md").read_bytes()}


@pytest.fixture(scope="module")
def stored_data(s3: S3, tiny_data: Path) -> StoragePath:
    """A small data directory in the object store."""
    place = StoragePath.of(s3("nodes")) / "tiny"
    for path in tiny_data.iterdir():
        (place / path.name).publish_file(path)
    return place


def test_a_local_path_is_refused(cluster: Cluster, folder: Path, stored_data: StoragePath) -> None:
    out = str(folder / "local")
    status, _, said = run(cluster, folder, TRAIN, f"--data={stored_data}", f"--out={out}", "--recipe=demo")
    assert status == 2
    assert f"error: out {out}: is a path of this machine, and the cluster has 2 nodes; use a URI that every" in said
    assert not Path(out).exists()


def test_a_training_goes_on_with_fewer_workers_when_a_node_is_lost(
    cluster: Cluster, folder: Path, stored_data: StoragePath, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its second checkpoint."""
    lost = threading.Event()

    def lose_node(asked: str, port: int) -> tuple[str, str] | None:
        if lost.is_set() or not re.search("PUT .*/fewer/checkpoints/epoch_0002/model.safetensors", asked):
            return None
        lost.set()
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        return "503 Slow Down", "SlowDown"

    monkeypatch.setattr(s3, "hook", lose_node)
    out = stored_data.parent / "fewer"
    num_epochs = 20  # of a third of a second: some are left when the loss is felt, as checkpoints are written behind
    options = [f"--data={stored_data}", f"--out={out}", "--recipe=demo", f"--num-epochs={num_epochs}"]
    options.append("--num-workers=1:2")
    status, printed, said = run(cluster, folder, TRAIN, *options, "--tracking.uri=sqlite:///fewer.db")
    assert status == 0, said
    assert lost.is_set()
    done = [line.split()[1] for line in printed.splitlines() if " done, " in line]
    assert done == [f"{epoch}/{num_epochs}" for epoch in range(1, num_epochs + 1)]
    # Seven images by two workers, then by one: from the latest checkpoint that was complete, the first or a later one.
    steps = [4 * together + 7 * (num_epochs - together) for together in range(1, num_epochs)]
    assert find_checkpoint(out).state["step"] in steps
