from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from instseg.config import ModelConfig, TrackingConfig, TrainConfig, ValidationConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import read_json, sha256_of, write_json
from instseg.data.schema import SCHEMA
from instseg.jobs import train as driver
from instseg.jobs import train_fit
from instseg.jobs.devices import Node
from instseg.jobs.train import train
from instseg.jobs.train_checks import check_same_run
from instseg.jobs.validations import BEST, best, records
from instseg.models.checkpoint import Checkpoint, epoch_folder, find_checkpoint, read_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.storage import StoragePath
from tests.conftest import REPOSITORY
from tests.jobs import train_and_die
from tests.jobs.conftest import NUM_IMAGES
from tests.jobs.ending import check_ending
from tests.jobs.local_training import patch_ray
from tests.jobs.train_and_die import KILL_DRIVER, KILL_WORKER

psutil = import_module("psutil", ray.__name__)  # Ray brings it along, and makes it importable
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]


WORKFLOWS = Path(__file__).parents[2] / "workflows"
UNREACHABLE = TrackingConfig(uri="http://127.0.0.1:9")
NUM_EPOCHS, STEPS_PER_EPOCH = 6, 4  # 7 images on 2 workers
RATE = "learning_rate_crf"


def make_config(data: Path, run: Path) -> TrainConfig:
    tracking = TrackingConfig(uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    return TrainConfig(
        data=str(data),
        out=str(run),
        num_epochs=NUM_EPOCHS,
        checkpoint_every=STEPS_PER_EPOCH // 2,
        keep_checkpoints=2 * NUM_EPOCHS - 3,
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
def said() -> io.StringIO:
    """What `finished` printed."""
    return io.StringIO()


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, said: io.StringIO
) -> TrainConfig:
    """An uninterrupted run, which is validated on the images that it learns."""
    config = make_config(tiny_data, tmp_path_factory.mktemp("runs") / "finished")
    validation = ValidationConfig(data=str(tiny_data), every=2 * STEPS_PER_EPOCH, num_images=4, num_panels=1)
    config = replace(config, validation=validation)
    with redirect_stdout(said):
        train(config)
    return config


def test_training_lowers_the_losses_and_leaves_a_network(finished: TrainConfig, said: io.StringIO) -> None:
    run = Path(finished.out)
    first, last = (read_checkpoint(epoch_folder(run, epoch)).model() for epoch in (2, NUM_EPOCHS))
    unchanged = [name for name in first if first[name].equal(last[name])]
    assert not unchanged
    lines = [line for line in said.getvalue().splitlines() if " done, " in line]
    assert [line.split()[1] for line in lines] == [f"{epoch}/{NUM_EPOCHS}" for epoch in range(1, NUM_EPOCHS + 1)]
    losses = [float(line.split("semantic loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < losses[0]
    assert all(line.endswith(" ms a step") for line in lines)
    state = find_checkpoint(run).state
    assert (state["epoch"], state["step"]) == (NUM_EPOCHS, NUM_EPOCHS * STEPS_PER_EPOCH)
    assert not epoch_folder(run, 1).is_folder()  # only the latest are kept
    assert InstanceNetwork.load(run).num_labels == 4


def recorded(config: TrainConfig) -> tuple[Any, Any]:
    """MLflow's client and its one run."""
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def steps_of(client: Any, run: Any, name: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_has_every_step(finished: TrainConfig) -> None:
    client, run = recorded(finished)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.num_epochs"] == str(NUM_EPOCHS)
    assert run.data.params["train.device"] == "cpu"
    for name, every in (("epoch_instance_loss", 4), ("semantic_loss", 2), ("gradient_norm", 2), (RATE, 2)):
        assert steps_of(client, run, name) == list(range(every, NUM_EPOCHS * STEPS_PER_EPOCH + 1, every)), name
    assert "system/cpu_utilization_percentage" in run.data.metrics
    inputs = [(data.dataset.digest, data.tags[0].value) for data in run.inputs.dataset_inputs]
    digest = PreparedDataset(finished.data).digest[:36]
    assert inputs == [(digest, "training"), (PreparedDataset(finished.data).subset(range(4)).digest[:36], "validation")]


def test_validated_beside_training(finished: TrainConfig, said: io.StringIO) -> None:
    """Each checkpoint that is due once; the best is kept, drawn, and registered as a model."""
    run, every = Path(finished.out), 2 * STEPS_PER_EPOCH
    found = records(run)
    assert [record["step"] for record in found] == list(range(every, NUM_EPOCHS * STEPS_PER_EPOCH + 1, every))
    winner = best(found, "ap_r_vol")
    assert winner is not None
    assert json.loads((run / BEST).read_text())["checkpoint"] == winner["checkpoint"]
    assert read_checkpoint(run / "checkpoints" / winner["checkpoint"]).state["step"] == winner["step"]
    assert said.getvalue().count("validation of epoch_") == len(found)
    client, recorded_run = recorded(finished)
    assert steps_of(client, recorded_run, "validation/ap_r_vol") == [record["step"] for record in found]
    (version,) = client.search_model_versions("name = 'instseg'")
    (logged,) = client.search_logged_models([recorded_run.info.experiment_id])
    assert (version.run_id, version.source) == (recorded_run.info.run_id, logged.artifact_location)
    pictures = [file.path for file in client.list_artifacts(recorded_run.info.run_id, "images") if ".png" in file.path]
    assert len(pictures) == 2 * len(found)


def test_a_finished_run_is_left_alone(finished: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = tensors_of(Path(finished.out))
    train(finished)
    said = capsys.readouterr().out
    assert "nothing to do" in said
    places, (following,) = check_ending(said)
    assert following.checkpoint == str(places[0])
    assert tensors_of(Path(finished.out)) == before


def test_a_driver_killed_before_it_logged_is_made_up_for(finished: TrainConfig, tmp_path: Path) -> None:
    """All checkpoints are there, and the spool says that the run was not finished in MLflow, which knows nothing."""
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "mlflow_spool.jsonl").touch()
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = replace(finished, out=str(tmp_path / "run"), tracking=tracking)
    train(config)
    client, run = recorded(config)
    assert run.info.status == "FINISHED"
    assert steps_of(client, run, "epoch_instance_loss") == [20, 24]
    assert steps_of(client, run, "semantic_loss") == [20, 22, 24]
    _, original = recorded(finished)
    lost = {name for name in original.data.metrics if name.startswith("system/")}  # of machines, then
    assert run.data.metrics == {name: original.data.metrics[name] for name in original.data.metrics.keys() - lost}
    assert not (tmp_path / "run" / "mlflow_spool.jsonl").exists()


def test_torn_checkpoint_and_no_mlflow_change_nothing(
    finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "mlflow_spool.key").unlink()
    checkpoints = StoragePath.of(run) / "checkpoints"
    for name in checkpoints.folders():
        if name > "epoch_0003":  # the one before is in the middle of an epoch
            (checkpoints / name).delete_folder()
    (epoch_folder(run, 3) / "model.safetensors").publish(b"torn")
    (epoch_folder(run, 3, 4) / "model.safetensors").publish(b"of a writer that was killed")
    train(replace(finished, out=str(run), tracking=TrackingConfig(uri="http://127.0.0.1:9")))
    assert tensors_of(run) == tensors_of(Path(finished.out))
    assert sum("cannot be reached" in record.message for record in caplog.records) <= 1
    assert any(f"checkpoint {epoch_folder(run, 3)}: model.safetensors is damaged" in text for text in caplog.messages)
    events = [json.loads(line) for line in (run / "mlflow_spool.jsonl").read_text().splitlines()]
    operations = [event["op"] for event in events]
    assert operations[0] == "start"
    assert operations[-1] == "finish"
    # Steps 6 to 10 were done before: their records come from the checkpoint.
    assert {event["step"] for event in events if event["op"] == "metrics"} == set(range(6, 25, 2))

    later = replace(finished, out=str(run), tracking=TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))
    train(later)  # nothing is left to do but to tell MLflow
    assert recorded(later)[1].info.status == "FINISHED"
    assert not (run / "mlflow_spool.jsonl").exists()


def test_killed_in_the_middle_of_an_epoch_nothing_is_lost(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a worker, then the driver, by SIGKILL; another driver goes on."""
    run = tmp_path / "run"
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = replace(finished, out=str(run), tracking=tracking)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, train_and_die.__file__, str(run)]
    died = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    assert (tmp_path / "worker").exists()
    monkeypatch.setattr(train_fit, "train_loop", train_and_die.watched_loop(tmp_path))
    train(config)
    assert tensors_of(run) == tensors_of(Path(finished.out))
    client, record = recorded(config)  # of the one run that there is
    assert record.info.status == "FINISHED"
    _, original = recorded(finished)
    for name in ("semantic_loss", "epoch_instance_loss"):
        assert record.data.metrics[name] == original.data.metrics[name]
    assert steps_of(client, record, "semantic_loss") == list(range(2, NUM_EPOCHS * STEPS_PER_EPOCH + 1, 2))
    check_images(tmp_path, PreparedDataset(config.data).image_ids)


def check_images(folder: Path, image_ids: Sequence[str]) -> None:
    """Each of three attempts began with the step after a checkpoint; no image was skipped or repeated."""
    taken: dict[int, list[str]] = {}
    for rank in range(2):
        lines = [json.loads(line) for line in (folder / f"steps_{rank}.jsonl").read_text().splitlines()]
        attempts = [[step for pid, step, _ in lines if pid == each] for each in dict.fromkeys(pid for pid, *_ in lines)]
        assert [steps[0] for steps in attempts] == [0, KILL_WORKER - 1, KILL_DRIVER - 1]
        assert all(steps == list(range(steps[0], steps[-1] + 1)) for steps in attempts)
        of_rank = {step: ids for _, step, ids in lines}
        assert all(of_rank[step] == ids for _, step, ids in lines)
        for step, ids in of_rank.items():
            taken.setdefault(step, []).extend(ids)
    assert sorted(taken) == list(range(NUM_EPOCHS * STEPS_PER_EPOCH))
    for epoch in range(NUM_EPOCHS):
        order = [image for step in range(STEPS_PER_EPOCH) for image in taken[epoch * STEPS_PER_EPOCH + step]]
        assert sorted(order[:NUM_IMAGES]) == sorted(image_ids)


@pytest.mark.parametrize("options", [{"images_per_worker": 2}, {"accumulate": 2}])
def test_one_worker_with_the_images_of_two_is_the_same_training(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    local = patch_ray(monkeypatch)
    local.run(replace(finished, num_workers=1, out=str(tmp_path / "run"), device="cpu", **options))
    client, run = recorded(finished)
    for name in ("semantic_loss", "instance_loss"):
        history = client.get_metric_history(run.info.run_id, name)
        curve = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
        assert len(curve) == NUM_EPOCHS * STEPS_PER_EPOCH // 2
        assert local.curve(name) == pytest.approx(curve, abs=1e-5)


def test_a_run_directory_belongs_to_one_configuration(finished: TrainConfig) -> None:
    changed = replace(finished, learning_rate_crf=0.5)
    with pytest.raises(ValueError, match=r"was trained with train\.learning_rate_crf = 0\.01, not 0\.5"):
        train(changed)
    changed = replace(finished, model=replace(finished.model, semantic="fcn8s"))
    with pytest.raises(ValueError, match=r"was trained with model\.semantic = 'logits', not 'fcn8s'"):
        train(changed)


def test_a_run_belongs_to_its_data(
    finished: TrainConfig, write_data: Callable[[Path, Iterable[int]], Path], tmp_path: Path
) -> None:
    """The same data elsewhere is the same; other images are not, even under the same path."""
    (tmp_path / "same").mkdir()
    train(replace(finished, data=str(write_data(tmp_path / "same", range(NUM_IMAGES)))))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"was trained on other data \(digest \w{12}, not \w{12}\)"):
        train(replace(finished, data=str(write_data(tmp_path / "other", range(3)))))


def test_a_checkpoint_says_where_it_comes_from(finished: TrainConfig) -> None:
    config = find_checkpoint(finished.out).config
    assert config["data_digest"] == PreparedDataset(finished.data).digest
    assert config["provenance"].keys() == {"commit", "versions", "machine"}
    assert config["train"]["num_epochs"] == NUM_EPOCHS


def test_a_cosine_cannot_be_made_longer(finished: TrainConfig) -> None:
    message = r"was trained with train\.num_epochs = 6, not 8; the learning rate falls to 0 at the last of them"
    with pytest.raises(ValueError, match=message):
        train(replace(finished, num_epochs=8))


def test_a_constant_rate_can_go_on() -> None:
    settings = {"classes": [], "train": {"learning_rate_schedule": "constant", "num_epochs": 1}}
    longer = {"classes": [], "train": {"learning_rate_schedule": "constant", "num_epochs": 2}}
    check_same_run(Checkpoint(epoch_folder("run", 1), settings, {}), longer)


def test_classes_in_another_order_are_refused(finished: TrainConfig, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    manifest = read_json(tiny_data / "manifest.json")
    manifest["classes"][2:] = reversed(manifest["classes"][2:])
    write_json(tmp_path / "data" / "manifest.json", manifest)
    with pytest.raises(ValueError, match="was trained with class 2 = 'circle', in the data it is 'cross'"):
        train(replace(finished, data=str(tmp_path / "data"), validation=ValidationConfig()))
    with pytest.raises(ValueError, match=r"validation\.data .*: expected the classes of the training data, .* got"):
        train(replace(finished, data=str(tmp_path / "data")))


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has(tiny_data: Path, tmp_path: Path) -> None:
    config = make_config(tiny_data, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"num_workers: expected at most 2 .* got 3; the cluster has 2 CPUs and 0 GPUs"
    ):
        train(replace(config, num_workers=3))
    with pytest.raises(ValueError, match="num_workers: expected at most 0 with 1 CPU and a GPU each"):
        train(replace(config, device="gpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("num_workers", "device", "warns"), [(2, "cpu", True), (1, "gpu", False)])
def test_a_gpu_is_never_left_idle_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_workers: int, device: str, warns: bool
) -> None:
    monkeypatch.setattr(driver, "cluster_nodes", lambda: [Node(8, 1)])
    assert driver._with_device(TrainConfig("d", "o", num_workers=num_workers)).device == device
    assert ("warning: training on CPUs" in capsys.readouterr().err) == warns


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_cannot_write_says_so(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / epoch_folder(run, 0, 2).name).touch()  # a file where the folder belongs
    config = replace(make_config(tiny_data, run), num_workers=1, max_failures=0, tracking=UNREACHABLE)
    with pytest.raises(OSError, match="checkpoints") as raised:
        train(config)
    assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)


@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_is_one_line_and_status_130(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [f"--data={tiny_data}", f"--out={run}", "--num-epochs=1000", "--num-workers=1"]
    command = [sys.executable, str(WORKFLOWS / "train.py"), *options, f"--tracking.uri={UNREACHABLE.uri}"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    # Jobs in the background of a shell ignore the signal, and so would their children.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed) as process:
        try:
            assert process.stdout is not None
            assert any("epoch 1/1000 done" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert '"status": "KILLED"' in (run / "mlflow_spool.jsonl").read_text().splitlines()[-1]


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
