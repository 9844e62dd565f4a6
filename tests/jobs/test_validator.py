from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from instseg.config import ValidationConfig
from instseg.jobs.cluster import cluster
from instseg.jobs.run_log import shown
from instseg.jobs.validations import VALIDATIONS, catch_up, records
from instseg.jobs.validator import in_words, log_validations, validating
from tests.jobs.test_validations import save


@pytest.mark.ray
def test_it_works_beside_workers_that_have_all_cpus_and_survives_the_end_of_its_process(
    tmp_path: Path, tiny_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Worker:  # in a function, so that Ray sends it with its code
        """Stands for the training's workers, which have all CPUs."""

        def ready(self) -> None:
            pass

    config = ValidationConfig(data=str(tiny_data), num_panels=1)
    save(tmp_path, 1)  # of an earlier run, which was killed before it had validated it
    with cluster(), shown() as log:
        worker: Any = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Worker).remote()
        ray.get(worker.ready.remote())
        with validating(tmp_path, config, log) as validator:
            save(tmp_path, 2)
            validator.catch_up()
            ray.kill(validator._actor, no_restart=False)
            save(tmp_path, 3)
            validator.catch_up()
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30]
    assert not [record for record in records(tmp_path) if "error" in record]
    assert "validation of epoch_0003, step 30: AP^r_vol" in capfd.readouterr().out


class _Calls:
    """What a tracker is told."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, int, set[str]]] = []
        self.images: list[tuple[str, str, int, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int, time_ms: int) -> None:
        self.metrics.append((step, time_ms, set(metrics)))

    def log_image(self, place: Any, key: str, step: int, time_ms: int) -> None:
        self.images.append((Path(str(place)).name, key, step, time_ms))


def test_what_was_found_is_logged_by_its_own_step_and_time(tmp_path: Path, tiny_data: Path) -> None:
    save(tmp_path, 2)
    (record,) = catch_up(tmp_path, ValidationConfig(data=str(tiny_data)))
    tracker: Any = _Calls()
    logged: set[str] = set()
    log_validations(tracker, tmp_path, logged)
    log_validations(tracker, tmp_path, logged)
    assert tracker.metrics == [(20, record["time_ms"], {f"validation/{name}" for name in record["metrics"]})]
    assert tracker.images == [
        (f"epoch_0002_{name}.png", name, 20, record["time_ms"]) for name in ("panels", "crf_parameters")
    ]
    log_validations(tracker, tmp_path, set())  # by a driver that was restarted: the same once more
    assert tracker.metrics[0] == tracker.metrics[1]


def test_a_failure_is_said(tmp_path: Path, tiny_data: Path) -> None:
    save(tmp_path, 1, ["background", "square", "circle", "star"])
    (record,) = catch_up(tmp_path, ValidationConfig(data=str(tiny_data)))
    assert in_words(record).startswith("validation of epoch_0001 failed: checkpoint")
    assert [path.suffix for path in (tmp_path / VALIDATIONS).iterdir()] == [".json"]
