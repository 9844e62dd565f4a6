from __future__ import annotations

import json
import logging
import math
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from PIL import Image

from instseg.config import TrackingConfig
from instseg.jobs import mlflow_server
from instseg.jobs.mlflow_server import resolve_uri
from instseg.jobs.tracking import Tracker, how_to_open

UNREACHABLE = TrackingConfig(uri="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def config(store: Path, request: pytest.FixtureRequest) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{store}/mlflow.db", experiment=request.node.name)


def runs_of(config: TrackingConfig) -> list[Any]:
    with mlflow_server.quiet():
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=resolve_uri(config))
        experiment = client.get_experiment_by_name(config.experiment)
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def history(config: TrackingConfig, run_id: str, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    points = MlflowClient(tracking_uri=resolve_uri(config)).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_a_run_is_recorded(config: TrackingConfig, store: Path, tmp_path: Path) -> None:
    spool = tmp_path / "run" / "spool.jsonl"
    artifact = tmp_path / "table.txt"
    artifact.write_text("table")
    params = {"model": {"crf": {"num_iterations": 5}}, "seed": 0}
    with Tracker.start(config, "name", params, {"kind": "test"}, spool) as tracker:
        tracker.log_metrics({"loss": 2.0}, step=0)
        tracker.log_metrics({"loss": 1.0, "nan": math.nan}, step=1)
        tracker.log_artifact(artifact)
    (run,) = runs_of(config)
    assert run.info.run_id == tracker.run_id
    assert (run.info.run_name, run.info.status) == ("name", "FINISHED")
    assert run.data.params == {"model.crf.num_iterations": "5", "seed": "0"}
    assert run.data.tags["kind"] == "test"
    assert run.data.metrics["loss"] == 1.0
    assert math.isnan(run.data.metrics["nan"])
    assert history(config, run.info.run_id, "loss") == [(0, 2.0), (1, 1.0)]
    assert [path.read_text() for path in (store / "mlartifacts").rglob("table.txt")] == ["table"]
    assert not spool.exists()


def test_more_parameters_than_one_call_takes(config: TrackingConfig, tmp_path: Path) -> None:
    params = {f"p{index}": index for index in range(250)}
    Tracker.start(config, "name", params, {}, tmp_path / "spool").finish()
    assert len(runs_of(config)[0].data.params) == 250


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_no_run_is_left_running(
    config: TrackingConfig, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), Tracker.start(config, "name", {}, {}, tmp_path / "spool"):
        raise error
    assert [run.info.status for run in runs_of(config)] == [status]


def test_a_resumed_run_is_the_same_run(config: TrackingConfig, tmp_path: Path) -> None:
    spool = tmp_path / "run" / "spool.jsonl"
    Tracker.start(config, "name", {"a": 1}, {}, spool).log_metrics({"loss": 1.0}, step=0)  # the driver dies
    tracker = Tracker.start(config, "name", {"a": 2, "b": 3}, {}, spool)
    tracker.log_metrics({"loss": 0.5}, step=1)
    assert [run.info.status for run in runs_of(config)] == ["RUNNING"]
    tracker.finish()
    (run,) = runs_of(config)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1", "b": "3"}
    assert history(config, run.info.run_id, "loss") == [(0, 1.0), (1, 0.5)]


def test_a_new_run_on_request_or_in_a_new_directory(config: TrackingConfig, tmp_path: Path) -> None:
    Tracker.start(config, "one", {}, {}, tmp_path / "a" / "spool").finish()
    Tracker.start(config, "two", {}, {}, tmp_path / "a" / "spool", resume=False).finish()
    Tracker.start(config, "three", {}, {}, tmp_path / "b" / "spool").finish()
    assert len(runs_of(config)) == 3


def test_nested_runs(config: TrackingConfig, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with (
        Tracker.start(config, "parent", {}, {}, spool, resume=False) as parent,
        Tracker.start(config, "child", {}, {}, spool, parent=parent, resume=False) as child,
    ):
        child.log_metrics({"x": 1.0})
    names = {run.info.run_name: run for run in runs_of(config)}
    assert names["child"].data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_pickled_tracker_logs_to_the_same_run(config: TrackingConfig, tmp_path: Path) -> None:
    tracker = Tracker.start(config, "name", {}, {}, tmp_path / "spool")
    pickle.loads(pickle.dumps(tracker)).log_metrics({"loss": 1.0}, step=3)  # noqa: S301 (as Ray does)
    tracker.finish()
    (run,) = runs_of(config)
    assert history(config, run.info.run_id, "loss") == [(3, 1.0)]


def test_unreachable_server_warns_once_and_is_replayed(
    config: TrackingConfig, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool.jsonl"
    artifact = tmp_path / "late.txt"
    artifact.write_text("late")
    began = time.perf_counter()
    with caplog.at_level(logging.WARNING), Tracker.start(UNREACHABLE, "down", {"a": 1}, {}, spool) as parent:
        with Tracker.start(UNREACHABLE, "child", {}, {}, spool, parent=parent, resume=False) as child:
            for step in range(20):
                child.log_metrics({"loss": 20.0 - step}, step)
        parent.log_artifact(artifact)
        assert parent.run_id is None
    assert time.perf_counter() - began < 15
    assert len(caplog.records) == 1
    assert "127.0.0.1:9" in caplog.text
    assert str(spool) in caplog.text
    assert len(spool.read_text().splitlines()) == 25

    Tracker.start(config, "up", {}, {}, spool, resume=False).finish()
    assert not spool.exists()
    names = {run.info.run_name: run for run in runs_of(config)}
    assert sorted(names) == ["child", "down", "up"]
    assert {run.info.status for run in names.values()} == {"FINISHED"}
    assert names["child"].data.tags["mlflow.parentRunId"] == names["down"].info.run_id
    assert history(config, names["child"].info.run_id, "loss") == [(step, 20.0 - step) for step in range(20)]
    assert list((store / "mlartifacts").rglob("late.txt"))


def test_a_server_that_hangs_does_not_hang_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(2)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server = HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.perf_counter()
    with Tracker.start(TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}"), "x", {}, {}, tmp_path / "s"):
        pass
    assert time.perf_counter() - began < 15
    server.shutdown()
    server.server_close()


def test_the_same_tracker_replays_when_the_server_is_back(
    config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_server, "RETRY_SECONDS", 0.0)
    real_apply = mlflow_server.Server._apply
    outage = {"on": False}

    def apply(server: mlflow_server.Server, event: dict[str, Any]) -> None:
        if outage["on"]:
            raise ConnectionError("down")
        real_apply(server, event)

    monkeypatch.setattr(mlflow_server.Server, "_apply", apply)
    with Tracker.start(config, "name", {}, {}, tmp_path / "spool") as tracker:
        for step in range(6):
            outage["on"] = step in (1, 2, 3)
            tracker.log_metrics({"loss": float(step)}, step)
            assert bool((tmp_path / "spool").read_text()) == outage["on"]
    (run,) = runs_of(config)
    assert history(config, run.info.run_id, "loss") == [(step, float(step)) for step in range(6)]


def test_replaying_twice_records_once(config: TrackingConfig, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with Tracker.start(UNREACHABLE, "down", {"a": 1}, {}, spool) as tracker:
        tracker.log_metrics({"loss": 1.0}, step=0)
    events = spool.read_text()
    spool.write_text(events + events)  # the driver died after sending and before clearing the spool
    Tracker.start(config, "up", {}, {}, spool, resume=False).finish()
    names = [run.info.run_name for run in runs_of(config)]
    assert sorted(names) == ["down", "up"]
    run = next(run for run in runs_of(config) if run.info.run_name == "down")
    assert history(config, run.info.run_id, "loss") == [(0, 1.0)]


def test_the_spool_is_there_until_the_run_is_finished(config: TrackingConfig, tmp_path: Path) -> None:
    tracker = Tracker.start(config, "name", {}, {}, tmp_path / "spool")
    assert (tmp_path / "spool").read_text() == ""
    tracker.finish()
    assert not (tmp_path / "spool").exists()


def test_the_same_number_of_the_same_moment_is_recorded_once(config: TrackingConfig, tmp_path: Path) -> None:
    with Tracker.start(config, "name", {}, {}, tmp_path / "spool") as tracker:
        for _ in range(2):
            tracker.log_metrics({"loss": 1.0}, step=4, time_ms=1_000)
    assert history(config, runs_of(config)[0].info.run_id, "loss") == [(4, 1.0)]


def test_data_pictures_and_tables_are_recorded_once_whether_at_once_or_replayed(
    config: TrackingConfig, tmp_path: Path
) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "panels.png")
    for uri in (config.uri, UNREACHABLE.uri, config.uri):
        with Tracker.start(replace(config, uri=uri), "name", {}, {}, tmp_path / "spool") as tracker:
            tracker.log_input("voc", "s3://bucket/voc", 64 * "a", 7, "training")
            tracker.log_input("voc", "s3://bucket/voc", 64 * "b", 5, "validation")
            tracker.log_image(tmp_path / "panels.png", "panels", step=4, time_ms=1_000)
            tracker.log_image(tmp_path / "panels.png", "panels", step=8, time_ms=2_000)
            tracker.log_table([{"class": "cat", "ap": 1.5}, {"class": "dog", "ap": math.nan, "iou": 2}], "classes")
    (run,) = runs_of(config)
    inputs = {each.tags[0].value: json.loads(each.dataset.profile) for each in run.inputs.dataset_inputs}
    assert inputs == {
        "training": {"num_images": 7, "sha256": 64 * "a"},
        "validation": {"num_images": 5, "sha256": 64 * "b"},
    }
    folder = Path(unquote(urlparse(run.info.artifact_uri).path))
    names = sorted(path.name.rpartition("+")[0] for path in (folder / "images").glob("*.png"))
    assert names == ["panels+step+4+timestamp+1000", "panels+step+8+timestamp+2000"]
    table = json.loads((folder / "classes.json").read_text())
    assert table == {"columns": ["class", "ap", "iou"], "data": [["cat", 1.5, None], ["dog", None, 2.0]]}
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "classes.json", "type": "table"}]


def test_a_deleted_experiment_is_named_and_keeps_the_spool(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    Tracker.start(config, "before", {}, {}, tmp_path / "a").finish()
    client = MlflowClient(tracking_uri=resolve_uri(config))
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    Tracker.start(config, "during", {}, {}, tmp_path / "b").finish()
    (warning,) = caplog.messages
    assert f"has deleted the experiment '{config.experiment}'" in warning
    assert f"mlflow experiments restore --experiment-id {experiment.experiment_id}" in warning
    assert "cannot be reached" not in warning
    assert [json.loads(line)["op"] for line in (tmp_path / "b").read_text().splitlines()] == ["start", "finish"]
    client.restore_experiment(experiment.experiment_id)
    Tracker.start(config, "after", {}, {}, tmp_path / "b", resume=False).finish()
    assert sorted(run.info.run_name for run in runs_of(config)) == ["after", "before", "during"]


def test_a_torn_line_and_a_lost_artifact_do_not_block_the_spool(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool"
    with Tracker.start(UNREACHABLE, "down", {}, {}, spool) as tracker:
        tracker.log_artifact(tmp_path / "gone.txt")
        tracker.log_metrics({"loss": 1.0}, step=0)
    spool.write_text(spool.read_text() + json.dumps({"op": "metrics"})[:9])
    Tracker.start(config, "up", {}, {}, spool, resume=False).finish()
    assert not spool.exists()
    assert "torn line" in caplog.text
    assert "gone.txt" in caplog.text
    run = next(run for run in runs_of(config) if run.info.run_name == "down")
    assert run.data.metrics == {"loss": 1.0}


def test_uri_and_how_to_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert how_to_open(TrackingConfig()) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert how_to_open(TrackingConfig()) == "http://server:5000"
    assert resolve_uri(TrackingConfig(uri="sqlite:////abs/x.db")) == "sqlite:////abs/x.db"


def test_mlflow_is_not_imported_by_importing_us() -> None:
    code = "import sys, instseg.jobs.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_first_contact_is_silent(tmp_path: Path) -> None:
    code = """
from instseg.config import TrackingConfig
from instseg.jobs.tracking import Tracker
Tracker.start(TrackingConfig(uri="sqlite:///new.db"), "name", {}, {}, "spool").finish()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout + done.stderr == ""
