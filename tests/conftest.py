"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from instseg.data.synthetic import write_synthetic_devkit
from tests.s3 import S3, running_s3

REPOSITORY = Path(__file__).resolve().parents[1]
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # 30 by default: too short on a busy machine
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tests are no use, and the counting is a process of its own
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process more, and no node is given notice here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest first, so that no process is left with them at the end: two nodes, then all that starts Ray."""
    items.sort(key=lambda item: (item.path.name != "test_two_nodes.py", item.get_closest_marker("ray") is None))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the repository; a test that asks for it skips where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: it is not part of the repository")
    return folder


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: a wrong argument meets the package's own errors, not those of the annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server, shared by the tests of one session; each takes a bucket or a prefix of its own."""
    with running_s3() as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with two CPUs, shared by the tests of one session."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated devkit of four training and two validation images; tests that damage it copy it first."""
    root = tmp_path_factory.mktemp("devkit")
    write_synthetic_devkit(str(root), num_train=4, num_val=2, seed=3, size=(64, 96))
    return root
