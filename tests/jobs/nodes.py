"""Two Ray nodes on this machine, which have neither a working folder nor a temporary one in common."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import REPOSITORY

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def two_nodes(folder: Path, num_gpus: int = 0) -> Iterator[Cluster]:
    """A head and a node of one CPU each, and of imagined GPUs; they work in `folder`/head and `folder`/node."""
    cluster = Cluster()
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in LOOPBACK.items():
                patch.setenv(name, value)
            patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
            patch.setenv("PYTHONPATH", str(REPOSITORY))
            for name in ("head", "node"):
                # Short, for the sockets in it.
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=name, dir="/tmp"))
                (Path(temporary) / "ray").mkdir()
                patch.chdir(folder / name)
                patch.setenv("TMPDIR", temporary)
                patch.setattr(tempfile, "tempdir", None)
                cluster.add_node(num_cpus=1, num_gpus=num_gpus, include_dashboard=False, temp_dir=f"{temporary}/ray")
        stack.callback(cluster.shutdown)
        yield cluster
