from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instseg.config import TrackingConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import read_json, write_json
from instseg.data.folds import split_folds
from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.records import read_records, write_records
from instseg.jobs import crossvalidate as job
from instseg.jobs.crossvalidate import crossvalidate
from instseg.jobs.devices import EvaluatorPlan, Node
from instseg.jobs.tracking import Tracker
from instseg.jobs.train import train
from instseg.jobs.train_checks import training_settings
from instseg.models.checkpoint import epoch_folder, find_checkpoint, save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.report.ablation import ROWS
from instseg.report.tables import Evaluation
from instseg.storage import StoragePath
from tests.jobs.alone import records_alone
from tests.jobs.conftest import NUM_IMAGES
from tests.jobs.ending import check_ending

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]
ROW_NAMES = [row.name for row in ROWS]
DAMAGED, _, MISSING = (Path("fold_1", name, "records.arrow") for name in ROW_NAMES[:3])


@pytest.fixture
def config(write_data: Callable[[Path, Iterable[int]], Path], tmp_path: Path) -> TrainConfig:
    """Seven images, each in a shard of its own, in two folds."""
    data, shards, manifest = tmp_path / "data", [], {}
    data.mkdir()
    for index in range(NUM_IMAGES):
        (part := tmp_path / f"part_{index}").mkdir()
        manifest = read_json(write_data(part, [index]) / "manifest.json")
        shards.append(manifest["shards"][0] | {"file": f"{index}.parquet"})
        (part / "shard.parquet").rename(data / f"{index}.parquet")
    write_json(data / "manifest.json", manifest | {"shards": shards})
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    return TrainConfig(str(data), str(tmp_path / "out"), num_folds=2, num_workers=1, tracking=tracking)


def held_out(config: TrainConfig) -> list[list[int]]:
    return [list(fold) for fold in split_folds(PreparedDataset(config.data).image_ids, 2, 0)]


def train_last(config: TrainConfig, parent: Tracker) -> StoragePath:
    """Train the last fold, while nobody can read the images that it holds out; the first keeps the initial weights."""
    assert config.held_out is not None
    if config.held_out == 0:
        dataset, folder = PreparedDataset(config.data), epoch_folder(config.out, config.num_epochs)
        weights = InstanceNetwork(config.model, dataset.num_labels).state_dict()
        save_checkpoint(folder, weights, training_settings(config, dataset))
        return folder
    shards = [Path(config.data) / f"{index}.parquet" for index in held_out(config)[config.held_out]]
    contents = {shard: shard.read_bytes() for shard in shards}
    for shard, content in contents.items():
        shard.write_bytes(bytes(len(content)))
    folder = train(config, parent)
    for shard, content in contents.items():
        shard.write_bytes(content)
    return folder


@pytest.mark.usefixtures("ray_cluster", "without_shape_checks")  # which take longer than the bootstrap
def test_every_image_is_scored_once_by_a_network_that_has_not_seen_it(
    config: TrainConfig,
    write_data: Callable[[Path, Iterable[int]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("instseg.jobs.evaluate.cluster_nodes", lambda: [Node(cpus=1, gpus=0)])  # for one actor
    out = Path(config.out)
    interrupt(config, monkeypatch)
    before = files_of_folds(out)
    assert MISSING not in before
    (out / DAMAGED).write_bytes((out / DAMAGED).read_bytes()[:-100])
    del before[DAMAGED]

    assert "fold 1 (2 of 2 to do): training on 4 images, evaluating on the 3 others" in capsys.readouterr().out
    evaluations = crossvalidate(config)
    printed = capsys.readouterr().out
    assert check_ending(printed)[0] == [Path(config.out) / name for name in ("report.html", "ablation.md")]
    assert "fold 1 (1 of 1 to do): training on 4 images, evaluating on the 3 others" in printed
    assert "training on 4 images, epochs" not in printed  # its checkpoint was there
    after = files_of_folds(out)
    assert before.items() <= after.items()

    trained = find_checkpoint(out / "fold_1" / "run")
    assert (trained.config["train"]["held_out"], trained.state["step"]) == (1, 4)
    check_scores(config, evaluations)
    table = (out / "ablation.md").read_text()
    assert "7 images" in table
    full = next(line for line in table.splitlines() if line.startswith("| 3 full"))
    assert full.split("|")[7].strip() == f"{evaluations['full'].metrics()['ap_r_vol']:.1f}"

    again = crossvalidate(config)
    assert "fold" not in capsys.readouterr().out.replace(config.out, "")
    assert files_of_folds(out) == after
    assert (out / "ablation.md").read_text() == table
    assert again["full"].metrics() == pytest.approx(evaluations["full"].metrics(), rel=0, abs=0, nan_ok=True)

    check_tracking(config)
    (tmp_path / "others").mkdir()
    check_refusals(config, write_data(tmp_path / "others", range(NUM_IMAGES - 1)))


def interrupt(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as far as the third row of the last fold, without actors; they do the rest."""

    def write(path: StoragePath, records: Sequence[ImageRecord]) -> None:
        if path == StoragePath.of(config.out) / MISSING.as_posix():
            raise KeyboardInterrupt
        write_records(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_records", write)
        patch.setattr(job, "train", train_last)
        patch.setattr("instseg.jobs.evaluate.Evaluators", without_actors)
        with pytest.raises(KeyboardInterrupt):
            crossvalidate(config)


@contextmanager
def without_actors(dataset: PreparedDataset, network: InstanceNetwork, plan: EvaluatorPlan) -> Iterator[Any]:
    """In the place of `Evaluators`."""
    yield SimpleNamespace(records=partial(records_alone, network, dataset))


def files_of_folds(out: Path) -> dict[Path, int]:
    files = [path for path in out.glob("fold_*/**/*") if path.is_file()]
    return {path.relative_to(out): path.stat().st_mtime_ns for path in files}


def check_scores(config: TrainConfig, evaluations: dict[str, Evaluation]) -> None:
    """As computed here, image by image."""
    dataset, out = PreparedDataset(config.data), Path(config.out)
    networks = [InstanceNetwork.load(out / f"fold_{fold}" / "run") for fold in range(2)]
    folds = [dataset.subset(indices) for indices in held_out(config)]
    assert list(evaluations) == ROW_NAMES
    for row in ROWS:
        pairs = zip(networks, folds, strict=True)
        records = [record for network, fold in pairs for record in records_alone(network, fold, row.ablation)]
        expected = Evaluation.of(records, dataset.classes)
        assert evaluations[row.name].metrics() == pytest.approx(expected.metrics(), nan_ok=True)
        assert evaluations[row.name].num_images == 7
        pooled = read_records(out / row.name / "records.arrow")
        assert sorted(record.image_id for record in pooled) == sorted(dataset.image_ids)
        assert (out / row.name / "results.json").is_file()


def check_tracking(config: TrainConfig) -> None:
    """One run each, however often the command was started."""
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'instseg'")
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)
    parent = runs["out"].info.run_id
    nested = {name for name, run in runs.items() if run.data.tags.get("mlflow.parentRunId") == parent}
    assert nested == {"fold_1", *ROW_NAMES}
    assert runs["out"].data.metrics["ap_r_vol"] == runs["full"].data.metrics["ap_r_vol"]
    assert runs["fold_1"].data.params["train.held_out"] == "1"


def check_refusals(config: TrainConfig, others: Path) -> None:
    """Folds of other settings or other images are never pooled with these."""
    for changes, message in (
        ({"fold_seed": 1}, r"was trained with train\.fold_seed = 0, not 1"),
        ({"num_folds": 3}, r"was trained with train\.num_folds = 2, not 3"),
        ({"learning_rate_crf": 0.5}, r"was trained with train\.learning_rate_crf = 0\.05, not 0\.5"),
        ({"data": str(others)}, r"was trained on other data"),
    ):
        with pytest.raises(ValueError, match=message):
            crossvalidate(replace(config, **changes))


def test_what_cannot_be_is_refused_before_anything_is_written(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="held_out: expected none, as each fold is held out in turn, got 1"):
        crossvalidate(replace(config, held_out=1))
    for num_folds in (1, 8):
        with pytest.raises(ValueError, match=f"num_folds: expected 2 to 7, the number of images, got {num_folds}"):
            crossvalidate(replace(config, num_folds=num_folds))
    assert not Path(config.out).exists()
