"""The benchmark contract: alternating measurements, median and spread, and where they come from, as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from instseg.report.provenance import commit

RESULTS = Path(__file__).parent / "results"


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """Time the candidates in turn, A B A B ..., so that a slow spell of the machine hits all of them.

    Returns:
        For each candidate median_ms, min_ms and max_ms over `rounds`, after one warm-up. Beside a candidate
        "pydensecrf" also pydensecrf_ratio: min, median and max over the rounds of the time divided by that one's.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(values, times.get("pydensecrf")) for name, values in times.items()}


def _summary(values: list[float], peer: list[float] | None) -> dict[str, Any]:
    summary = {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
    if peer is None:
        return summary
    ratios = [value / other for value, other in zip(values, peer, strict=True)]
    return summary | {"pydensecrf_ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}}


def write_result(name: str, content: dict[str, Any]) -> Path:
    """Write `results/<name>.json` with commit, versions and hardware."""
    provenance = {
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content | {"provenance": provenance}, indent=1) + "\n")
    return path
