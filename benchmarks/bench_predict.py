#!/usr/bin/env python
"""What predict needs of memory for 250, 500 and 1,000 small images: peaks of the driver and of Ray's workers."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.processes import descendants, memory_mib, name_of
from instseg.data.synthetic import write_synthetic_devkit

REPOSITORY = Path(__file__).resolve().parents[1]
COUNTS, SIZE = (250, 500, 1000), (64, 96)
EVERY_S = 0.5


def main() -> None:
    """Run predict on each number of images, in processes of its own, and write results/predict.json."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_synthetic_devkit(str(root), max(COUNTS), 0, seed=0, size=SIZE)
        runs = [measure(root, count) for count in COUNTS]
    print(write_result("predict", {"height_width": SIZE, "shard_size": 16, "runs": runs}))


def measure(root: Path, count: int) -> dict[str, Any]:
    """Predict the first `count` images, and look at the memory of all processes every half second."""
    some = root / f"some_{count}"
    some.mkdir()
    for path in sorted((root / "JPEGImages").iterdir())[:count]:
        (some / path.name).symlink_to(path)
    options = {"images": some, "detections": root / "detections.json", "logits": root / "logits"}
    options |= {"classes": root / "classes.txt", "out": root / f"out_{count}"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "workflows" / "predict.py"), *words])
    peaks = {"driver_mib": 0.0, "worker_mib": 0.0, "all_workers_mib": 0.0}
    while process.poll() is None:
        pids = [pid for pid in descendants(process.pid) if name_of(pid).startswith("ray::Map")]
        driver, *workers = (memory_mib(pid, "status", "RssAnon") for pid in (process.pid, *pids))
        now = (driver, max(workers, default=0.0), sum(workers))
        peaks = {name: max(peak, value) for (name, peak), value in zip(peaks.items(), now, strict=True)}
        time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(process.returncode)
    wall_s = time.monotonic() - start
    print(f"{count} images: {peaks}, {wall_s:.0f} s", flush=True)
    return {"num_images": count, "peak": {name: round(peak) for name, peak in peaks.items()}, "wall_s": round(wall_s)}


if __name__ == "__main__":
    main()
