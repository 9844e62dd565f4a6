from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instseg.config import Ablation, TrackingConfig, TrainConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import split_folds
from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.evaluation.records import read_records, write_records
from instseg.jobs import crossvalidate as job
from instseg.jobs.crossvalidate import crossvalidate
from instseg.jobs.train import train
from instseg.models.checkpoint import find_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.report.ablation import ROWS
from instseg.report.tables import Evaluation

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray warns of its own defaults
]
ROW_NAMES = [row.name for row in ROWS]
DAMAGED, _, MISSING = (Path("fold_1", name, "records.arrow") for name in ROW_NAMES[:3])


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> TrainConfig:
    """Seven images in two folds."""
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    return TrainConfig(str(tiny_data), str(tmp_path / "out"), num_folds=2, num_workers=1, tracking=tracking)


def held_out(config: TrainConfig) -> list[list[int]]:
    return [list(fold) for fold in split_folds(PreparedDataset(config.data).image_ids, 2, 0)]


@pytest.mark.usefixtures("ray_cluster")
def test_every_image_is_scored_once_by_a_network_that_has_not_seen_it(
    config: TrainConfig,
    write_data: Callable[[Path, Iterable[int]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(config.out)
    interrupt(config, monkeypatch)
    before = files_of_folds(out)
    assert MISSING not in before
    (out / DAMAGED).write_bytes((out / DAMAGED).read_bytes()[:-100])
    del before[DAMAGED]

    capsys.readouterr()
    evaluations = crossvalidate(config)
    printed = capsys.readouterr().out
    assert "fold 1 (1 of 1 to do): training on 4 images, evaluating on the 3 others" in printed
    assert "training on 4 images, epochs" not in printed  # its checkpoint was there
    after = files_of_folds(out)
    assert before.items() <= after.items()

    (tmp_path / "others").mkdir()
    others = write_data(tmp_path / "others", sorted(set(range(7)) - set(held_out(config)[1])))
    check_networks(config, others, tmp_path)
    check_scores(config, evaluations)
    table = (out / "ablation.md").read_text()
    assert "7 images" in table
    (full,) = [line for line in table.splitlines() if line.startswith("| 3 full")]
    assert full.split("|")[7].strip() == f"{evaluations['full'].metrics()['ap_r_vol']:.1f}"

    again = crossvalidate(config)
    assert "fold" not in capsys.readouterr().out.replace(config.out, "")
    assert files_of_folds(out) == after
    assert (out / "ablation.md").read_text() == table
    assert again["full"].metrics() == evaluations["full"].metrics()

    check_tracking(config)
    check_refusals(config, others)


def interrupt(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as far as the third row of the last fold."""

    def write(path: Path, records: Sequence[ImageRecord]) -> None:
        if path.parent == (Path(config.out) / MISSING).parent:
            path.write_bytes(b"torn")
            raise KeyboardInterrupt
        write_records(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_records", write)
        with pytest.raises(KeyboardInterrupt):
            crossvalidate(config)


def files_of_folds(out: Path) -> dict[Path, int]:
    files = [path for path in out.glob("fold_*/**/*") if path.is_file()]
    return {path.relative_to(out): path.stat().st_mtime_ns for path in files}


def check_networks(config: TrainConfig, others: Path, tmp_path: Path) -> None:
    """Without the images of fold 1 in the data directory, training comes to the same weights."""
    checkpoints = [find_checkpoint(Path(config.out) / f"fold_{fold}" / "run") for fold in (0, 1)]
    assert [checkpoint.config["train"]["held_out"] for checkpoint in checkpoints] == [0, 1]
    assert [checkpoint.state["step"] for checkpoint in checkpoints] == [3, 4]
    folder = train(replace(config, data=str(others), out=str(tmp_path / "by_hand")))
    assert (folder / "model.safetensors").read_bytes() == (checkpoints[1].folder / "model.safetensors").read_bytes()


def check_scores(config: TrainConfig, evaluations: dict[str, Evaluation]) -> None:
    """As computed here, image by image."""
    dataset, out = PreparedDataset(config.data), Path(config.out)
    assert list(evaluations) == ROW_NAMES
    for row in ROWS:
        records = []
        for fold, indices in enumerate(held_out(config)):
            network = InstanceNetwork.load(out / f"fold_{fold}" / "run").eval()
            records += [record_of(network, dataset, index, row.ablation) for index in indices]
        expected = Evaluation.of(records, dataset.classes)
        assert evaluations[row.name].metrics() == pytest.approx(expected.metrics())
        assert evaluations[row.name].num_images == 7
        pooled = read_records(out / row.name / "records.arrow")
        assert sorted(record.image_id for record in pooled) == sorted(dataset.image_ids)
        assert (out / row.name / "results.json").is_file()


def record_of(network: InstanceNetwork, dataset: PreparedDataset, index: int, ablation: Ablation) -> ImageRecord:
    with torch.inference_mode():
        output = network(dataset[index], ablation)
    before = output.semantic_logits.argmax(0).numpy()
    predicted, validity = network.instance_map(output, ablation), output.validity.numpy()
    return image_record(dataset[index], predicted, before, dataset.num_labels, validity)


def check_tracking(config: TrainConfig) -> None:
    """One run each, however often the command was started."""
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("instseg")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)
    parent = runs["out"].info.run_id
    nested = {name for name, run in runs.items() if run.data.tags.get("mlflow.parentRunId") == parent}
    assert nested == {"fold_0", "fold_1", *ROW_NAMES}
    assert runs["out"].data.metrics["ap_r_vol"] == runs["full"].data.metrics["ap_r_vol"]
    assert runs["fold_1"].data.params["train.held_out"] == "1"


def check_refusals(config: TrainConfig, others: Path) -> None:
    """Folds of other settings or other images are never pooled with these."""
    for changes, message in (
        ({"fold_seed": 1}, r"was trained with train\.fold_seed = 0, not 1"),
        ({"num_folds": 3}, r"was trained with train\.num_folds = 2, not 3"),
        ({"learning_rate_crf": 0.5}, r"was trained with train\.learning_rate_crf = 0\.05, not 0\.5"),
        ({"data": str(others)}, r"was trained with folds\.image_\d = \d, not "),
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
