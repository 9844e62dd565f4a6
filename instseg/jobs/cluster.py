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


@contextmanager
def cluster(num_cpus: int | None = None) -> Iterator[None]:
    """Connect to RAY_ADDRESS if set (as `ray job submit` does), else start Ray on this machine alone.

    Args:
        num_cpus: CPUs that a local cluster offers at least; default: this machine's.
    """
    import ray

    ours = not ray.is_initialized()
    if ours and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    elif ours:
        _start_local(max(num_cpus or 1, os.cpu_count() or 1))
    try:
        with _terminable():
            yield
    finally:
        if ours:
            ray.shutdown()


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


def _start_local(num_cpus: int) -> None:
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
        num_cpus=num_cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},  # works without installing the package
    )
