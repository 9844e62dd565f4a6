"""What the machine of the driver is busy with, by the names under which MLflow shows it as system metrics."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


class SystemMonitor:
    """Processors, memory, disk, network and, with nvidia-ml-py, GPUs of this machine, as MLflow's own monitor has them.

    Not that monitor itself: its thread gives up at the first outage of MLflow. What is sampled here is logged, and
    waits where MLflow cannot be reached, as any other number does.
    """

    def __init__(self) -> None:
        import ray  # noqa: F401  (it has the psutil that MLflow's monitors need, where none is installed)
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # without nvidia-ml-py, or without a GPU
            self._monitors.append(GPUMonitor())
        self.sample()  # the use of processors is a mean since the sample before

    def sample(self) -> dict[str, float]:
        """Numbers by name, such as "system/cpu_utilization_percentage", the mean since the last sample."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}
