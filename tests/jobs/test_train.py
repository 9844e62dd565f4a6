from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file

from instseg.config import ModelConfig, TrackingConfig, TrainConfig
from instseg.data.files import read_json, sha256_of, write_json
from instseg.data.schema import SCHEMA
from instseg.jobs.train import train
from instseg.models.checkpoint import epoch_folder, find_checkpoint
from instseg.models.network import InstanceNetwork

psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]


NUM_EPOCHS, STEPS_PER_EPOCH = 6, 4  # 7 images on 2 workers


def make_config(data: Path, run: Path) -> TrainConfig:
    tracking = TrackingConfig(uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    return TrainConfig(
        data=str(data),
        out=str(run),
        num_epochs=NUM_EPOCHS,
        keep_checkpoints=NUM_EPOCHS - 1,
        semantic_loss_weight=1.0,  # so that both losses are what training lowers
        instance_loss="log",
        learning_rate_crf=0.01,
        learning_rate_compatibility=0.001,
        tracking=tracking,
    )


def tensors_of(run: Path) -> dict[str, bytes]:
    folder = find_checkpoint(run).folder
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """An uninterrupted run."""
    config = make_config(tiny_data, tmp_path_factory.mktemp("runs") / "finished")
    train(config)
    return config


def test_training_lowers_the_losses_and_leaves_a_network(finished: TrainConfig) -> None:
    run = Path(finished.out)
    first, last = (load_file(epoch_folder(run, epoch) / "model.safetensors") for epoch in (2, NUM_EPOCHS))
    unchanged = [name for name in first if first[name].equal(last[name])]
    assert not unchanged
    losses = [float(line.split("semantic loss ")[1].split(",")[0]) for line in epochs_in_log(run)]
    assert losses[-1] < losses[0]
    assert find_checkpoint(run).state == {"epoch": NUM_EPOCHS, "step": NUM_EPOCHS * STEPS_PER_EPOCH}
    assert not epoch_folder(run, 1).exists()  # only the latest are kept
    assert InstanceNetwork.load(run).num_labels == 4
    assert not (run / "ray").exists()


def epochs_in_log(run: Path) -> list[str]:
    return [line for line in (run / "train.log").read_text().splitlines() if " done, " in line]


def test_mlflow_has_every_step(finished: TrainConfig) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(finished.tracking.uri)
    experiment = client.get_experiment_by_name(finished.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.num_epochs"] == str(NUM_EPOCHS)
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch_instance_loss")]
    assert steps == [STEPS_PER_EPOCH * epoch for epoch in range(1, NUM_EPOCHS + 1)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"model.safetensors", "config.json"}


def test_a_finished_run_is_left_alone(finished: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = tensors_of(Path(finished.out))
    train(finished)
    assert "nothing to do" in capsys.readouterr().out
    assert tensors_of(Path(finished.out)) == before


def test_torn_checkpoint_killed_worker_and_no_mlflow_change_nothing(
    finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "mlflow_spool.key").unlink()
    for epoch in range(4, NUM_EPOCHS + 1):
        shutil.rmtree(epoch_folder(run, epoch))
    (epoch_folder(run, 3) / "model.safetensors").write_bytes(b"torn")
    (run / "checkpoints" / "epoch_0004.partial").mkdir()
    killer = threading.Thread(target=kill_a_worker_when_repaired, args=(epoch_folder(run, 3),))
    killer.start()
    train(replace(finished, out=str(run), tracking=TrackingConfig(uri="http://127.0.0.1:9")))
    killer.join()
    assert tensors_of(run) == tensors_of(Path(finished.out))
    assert "failed" in (run / "train.log").read_text()
    assert sum("cannot be reached" in record.message for record in caplog.records) <= 1
    operations = [json.loads(line)["op"] for line in (run / "mlflow_spool.jsonl").read_text().splitlines()]
    assert operations[0] == "start"
    assert operations[-1] == "finish"
    assert operations.count("metrics") >= 2


def kill_a_worker_when_repaired(folder: Path) -> None:
    deadline = time.monotonic() + 200
    victim = None
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process().children(recursive=True)
        victim = next((child for child in children if "RayTrainWorker" in command_of(child)), None)
    assert victim is not None
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # between the removal of the torn one and its replacement
            if (folder / "model.safetensors").read_bytes() != b"torn":
                break
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)


def command_of(process: Any) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def test_a_run_directory_belongs_to_one_configuration(finished: TrainConfig) -> None:
    changed = replace(finished, learning_rate_crf=0.5)
    with pytest.raises(ValueError, match=r"was trained with train\.learning_rate_crf = 0\.01, not 0\.5"):
        train(changed)
    changed = replace(finished, model=replace(finished.model, semantic="fcn8s"))
    with pytest.raises(ValueError, match=r"was trained with model\.semantic = 'logits', not 'fcn8s'"):
        train(changed)


def test_data_is_checked_before_a_worker_starts(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run workflows/prepare\.py first"):
        train(make_config(tmp_path, tmp_path / "run"))
    manifest = read_json(tiny_data / "manifest.json")
    for column, message in (("semantic_logits", "has no logits"), ("semantic", "has no ground truth")):
        data = tmp_path / column
        shutil.copytree(tiny_data, data)
        rows = pq.read_table(data / "shard.parquet").to_pylist()
        without = [{**row, column: None} for row in rows]
        shard = data / "shard.parquet"
        pq.write_table(pa.Table.from_pylist(without, SCHEMA), shard, row_group_size=1)
        manifest["shards"][0] |= {"num_bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
        write_json(data / "manifest.json", manifest)
        with pytest.raises(ValueError, match=message):
            train(make_config(data, tmp_path / "run"))
    shutil.copytree(tiny_data, tmp_path / "classes")
    manifest = read_json(tiny_data / "manifest.json")
    manifest["classes"].append("triangle")
    write_json(tmp_path / "classes" / "manifest.json", manifest)
    with pytest.raises(ValueError, match="logits of 4 labels, expected 5"):
        train(make_config(tmp_path / "classes", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unknown_network_fails_in_the_driver(tiny_data: Path, tmp_path: Path) -> None:
    config = replace(make_config(tiny_data, tmp_path / "run"), model=ModelConfig(semantic="fcn9s"))
    with pytest.raises(ValueError, match="did you mean 'fcn8s'"):
        train(config)
