from __future__ import annotations

import math

from instseg.jobs.mlflow_server import quiet
from instseg.jobs.system_metrics import SystemMonitor


def test_a_sample_has_the_names_that_mlflow_shows_as_system_metrics() -> None:
    with quiet():
        monitor = SystemMonitor()
    sample = monitor.sample()
    assert all(name.startswith("system/") and math.isfinite(value) for name, value in sample.items())
    assert 0 <= sample["system/cpu_utilization_percentage"] <= 100
    assert 0 < sample["system/system_memory_usage_percentage"] < 100
    assert monitor.sample().keys() == sample.keys()
