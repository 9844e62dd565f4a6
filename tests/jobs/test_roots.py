from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from instseg.config import AblateConfig, DemoConfig, EvaluateConfig, PrepareConfig, TrainConfig
from instseg.jobs import roots
from instseg.jobs.ablate import ablate
from instseg.jobs.crossvalidate import crossvalidate
from instseg.jobs.demo import demo
from instseg.jobs.devices import Node
from instseg.jobs.evaluate import evaluate
from instseg.jobs.prepare import prepare
from instseg.jobs.roots import check_inputs, check_nodes, check_out
from instseg.jobs.train import train
from instseg.storage import StorageError, StoragePath
from tests.s3 import S3

ABSENT = "a bucket that does not exist"
NOBODY = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http"


def test_an_input_that_cannot_be_reached_is_named(s3: S3, tmp_path: Path) -> None:
    good = s3("inputs")
    check_inputs(devkit=good, detections=tmp_path / "not looked at", logits=None)
    with pytest.raises(StorageError, match=r"s3://absent.*there is no bucket absent"):
        check_inputs(devkit=good, logits=good.replace("s3://inputs", "s3://absent"))
    with pytest.raises(StorageError, match=r"s3://bucket/x.*: cannot be reached"):
        check_inputs(devkit=good, logits=NOBODY)


def test_a_root_that_cannot_be_written_is_named(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"expected a folder or a new name, but .*file is a file; choose another --out"
    ):
        check_out(tmp_path / "file" / "run")
    assert check_out(s3("outputs")) == StoragePath.of(s3("outputs"))
    new = s3("outputs").replace("?", "/run?")
    read_only = ("403 Forbidden", "AccessDenied")
    monkeypatch.setattr(s3, "hook", lambda asked, _: read_only if asked.startswith("PUT") else None)
    with pytest.raises(StorageError, match=r"s3://outputs.*: access denied"):
        check_out(new)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_paths_of_one_machine_are_for_one_node(monkeypatch: pytest.MonkeyPatch, num_nodes: int) -> None:
    monkeypatch.setattr(roots, "cluster_nodes", lambda: [Node(1, 0)] * num_nodes)
    everywhere = {"data": StoragePath.of("s3://bucket/data"), "logits": None, "out": StoragePath.of("file:///mnt/x")}
    check_nodes(**everywhere)
    if num_nodes == 1:
        check_nodes(**everywhere, devkit=StoragePath.of("/here"))
        return
    with pytest.raises(
        ValueError,
        match=r"devkit /here: is a path of this machine, and the cluster has 2 nodes; use a URI that every node "
        r"reaches, such as s3://bucket/prefix, or file:///here if all of them mount that folder",
    ):
        check_nodes(**everywhere, devkit=StoragePath.of("/here"))


@pytest.mark.parametrize(
    ("job", "config"),
    [
        (prepare, PrepareConfig("out", devkit=ABSENT, split="train", detections="detections.json")),
        (train, TrainConfig(ABSENT, "out")),
        (crossvalidate, TrainConfig(ABSENT, "out")),
        (evaluate, EvaluateConfig(ABSENT, "out")),
        (ablate, AblateConfig("data", "out", checkpoint=ABSENT)),
    ],
)
def test_every_workflow_looks_before_it_starts(
    job, config, s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    absent = s3("inputs").replace("s3://inputs", "s3://absent")
    given = {name: absent for name, value in vars(config).items() if value == ABSENT}
    with pytest.raises(StorageError, match="there is no bucket absent"):
        job(replace(config, **given))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_is_for_a_folder() -> None:
    with pytest.raises(ValueError, match="out: expected a folder of this machine, got s3://bucket/demo"):
        demo(DemoConfig("s3://bucket/demo"))
