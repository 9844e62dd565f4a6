"""Training as one worker of Ray Train would do it, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.train

from instseg.config import TrainConfig
from instseg.data.folds import training_images
from instseg.jobs.run_log import RunLog
from instseg.jobs.train_checks import training_settings
from instseg.jobs.train_loop import train_loop
from instseg.jobs.train_worker import Loop
from instseg.models.checkpoint import Checkpoint, latest_checkpoint
from instseg.storage import StoragePath
from instseg.training.objective import Objective


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class LocalTraining:
    """Runs trainings; `steps` has the image ids of each forward pass, `losses` the semantic loss of each step."""

    kill_before: Callable[[int], bool] = lambda num_passes: False
    passes: list[list[str]] = field(default_factory=list)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)  # by step

    def run(self, config: TrainConfig) -> Checkpoint:
        """To the end, or to `Killed`; the latest checkpoint."""
        (Path(config.out) / "checkpoints").mkdir(parents=True, exist_ok=True)
        settings = training_settings(config, training_images(config))
        log = cast(RunLog, SimpleNamespace(line_soon=lambda line: None))
        train_loop({"loop": Loop(config, settings, log)})
        checkpoint = latest_checkpoint(StoragePath.of(config.out))
        assert checkpoint is not None
        return checkpoint

    def curve(self, name: str) -> list[float]:
        """A quantity at each point that was recorded."""
        points = [point for _, record in sorted(self.records.items()) for point in record["points"]]
        return [values[name] for _, values in points]


def patch_ray(monkeypatch: pytest.MonkeyPatch) -> LocalTraining:
    """Put this process in the place of Ray Train."""
    local = LocalTraining()
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda data: data)
    monkeypatch.setattr("ray.train.torch.prepare_model", lambda model, **_: model)

    def report(metrics: dict[str, Any], checkpoint: Any, checkpoint_dir_name: str, **options: Any) -> None:
        local.records |= {record["step"]: record for record in metrics["records"]}
        options["checkpoint_upload_fn"](checkpoint, checkpoint_dir_name)

    monkeypatch.setattr(ray.train, "report", report)
    forward = Objective.forward

    def watched(self: Objective, samples: Any, *arguments: Any) -> Any:
        if local.kill_before(len(local.passes)):
            raise Killed
        local.passes.append([sample.image_id for sample in samples])
        return forward(self, samples, *arguments)

    monkeypatch.setattr(Objective, "forward", watched)
    return local
