"""The Ray cluster of a workflow: the one it was submitted to, or a local one for as long as it runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instseg.jobs.devices import Node


class JobError(RuntimeError):
    """A run that cannot go on although code, options and data are right: Ray does not start, a worker was killed."""


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to RAY_ADDRESS if set (as `ray job submit` does), else start Ray on this machine alone.

    Raises:
        ConnectionError: If there is no cluster at RAY_ADDRESS.
        JobError: If Ray does not start on this machine.
    """
    import ray

    ours = not ray.is_initialized()
    if ours and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    elif ours:
        _start_patiently()
    try:
        with _terminable():
            yield
    finally:
        if ours:
            ray.shutdown()


def cluster_nodes() -> list[Node]:
    """What the living nodes of the running cluster offer, whether others use it at the moment or not."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]


def usable_cpus() -> int:
    """CPUs that this process may use: of the machine, of its affinity and of its container, at least 1."""
    from ray._private.utils import get_num_cpus  # knows the quotas of containers, but no affinity

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, int(get_num_cpus(override_docker_cpu_warning=True))))


@contextmanager
def _terminable() -> Iterator[None]:
    """Leave in order on SIGTERM, which `ray job stop` sends, so that the MLflow run ends as killed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _start_patiently() -> None:
    """Start Ray; once more if it fails, as it does where its processes need more than its 30 seconds to come up."""
    import ray

    try:
        _start_local()
    except Exception as error:  # Ray has no type of its own for this
        print(f"warning: Ray did not start ({error}); trying once more", file=sys.stderr, flush=True)
        ray.shutdown()
        try:
            _start_local()
        except Exception as again:
            raise JobError(
                f"Ray did not start, twice: {again} Is this machine short of memory or very busy?"
            ) from again


def _start_local() -> None:
    import ray
    from ray._private import ray_constants

    # Ray replaces the loopback address by one that other machines reach, and listens on all of them, unless this is off
    # (despite the variable's name, on Linux too). The variable is for the processes that it starts.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray makes a token for a local cluster, which is right, and warns of it.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    repository = Path(__file__).resolve().parents[2]
    python_path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",
        num_cpus=usable_cpus(),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},  # works without installing the package
    )
