from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from instseg.config import FULL, Ablation, CompareConfig, EvaluateConfig, ModelConfig, TrackingConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.records import read_records, write_records
from instseg.jobs.cluster import JobError
from instseg.jobs.compare import compare
from instseg.jobs.tracking import Tracker
from instseg.models.network import InstanceNetwork
from instseg.report.results import write_results
from instseg.report.tables import Evaluation
from tests.jobs.alone import records_alone
from tests.jobs.ending import check_ending

ROWS = {"identification": Ablation(identification=False), "full": FULL}
pytestmark = pytest.mark.usefixtures("without_shape_checks")  # which take longer than the bootstrap


@pytest.fixture(scope="module")
def ablation(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an ablation with two rows, and the results of each, as evaluate writes them."""
    folder, dataset = tmp_path_factory.mktemp("results") / "ablation", PreparedDataset(tiny_data)
    for name, ablation in ROWS.items():
        config = EvaluateConfig(str(tiny_data), str(folder / name), model=ModelConfig(), ablation=ablation)
        records = records_alone(InstanceNetwork(ModelConfig(), dataset.num_labels), dataset, ablation)
        provenance = {"config": asdict(config), "data_digest": dataset.digest, "commit": "c"}
        write_results(Evaluation.of(records, dataset.classes), folder / name, provenance)
    (folder / "ablation.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tracking(ablation: Path) -> TrackingConfig:
    """MLflow with a run of the ablation and one within it for each row, and another run called `full`."""
    config = TrackingConfig(f"sqlite:///{ablation.parent}/mlflow.db", "test")
    tags = {"workflow": "ablate"}
    with Tracker.start(config, "table", {}, tags, ablation.parent / "spool", resume=False) as parent:
        for row in ROWS:
            with Tracker.start(config, row, {}, tags, ablation.parent / "s", parent, resume=False) as tracker:
                for name in ("results.json", "records.arrow"):
                    tracker.log_artifact(ablation / row / name)
    Tracker.start(config, "full", {}, {}, ablation.parent / "spool", resume=False).finish()
    return config


def config_of(results: Sequence[object], out: Path, **options: object) -> CompareConfig:
    return replace(CompareConfig(tuple(map(str, results)), str(out), num_resamples=50), **options)


def changed(ablation: Path, folder: Path, row: str = "full", **content: object) -> Path:
    """A copy of a row, of which results.json has other content."""
    shutil.copytree(ablation / row, folder)
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    return folder


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_two_folders(ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict comes first; the page has all in it; the images are those of the networks, run again."""
    found = compare(config_of([ablation / "identification", ablation / "full"], tmp_path))
    said = capsys.readouterr()
    first, *lines = said.out.splitlines()
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [first] == record["verdicts"]
    assert "full" in first
    assert "identification" in first
    assert record["differences"]["full"]["ap_r_vol"]["value"] == pytest.approx(100 * found["full"].ap_r_vol.value)
    settings = [line.split() for line in lines if line.startswith("ablation.")]
    assert settings == [["ablation.identification", "False", "True"]]
    assert "the paper" not in said.out  # whose classes are others
    assert not said.err
    assert check_ending(said.out)[1][0].diagnose
    assert (tmp_path / "images_B.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "comparison.html").read_text()
    assert first in page
    outside = [source.split(",")[0] for source in _Page(page).sources if not source.startswith("#")]
    assert outside == ["data:image/jpeg;base64"]


def test_an_ablation_stands_for_its_rows(ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(config_of([ablation], tmp_path, num_figures=0))
    assert list(found) == ["identification"]
    assert json.loads((tmp_path / "comparison.json").read_text())["first"] == "full"
    assert not (tmp_path / "images_B.png").exists()


def test_runs_of_mlflow_give_the_same(
    ablation: Path, tracking: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of a run with rows in it, by name and folder, and by a filter, which all are downloaded."""
    told = []
    by_filter = "tags.workflow = 'ablate' and attributes.run_name != 'table'"
    for results in ([ablation], ["table"], [by_filter]):
        compare(config_of(results, tmp_path, tracking=tracking, num_figures=0))
        told.append(json.loads((tmp_path / "comparison.json").read_text()))
    assert told[0] == told[1]
    assert (told[2]["first"], set(told[2]["metrics"])) == ("identification", set(ROWS))
    first = compare(config_of([ablation / "full", "identification"], tmp_path, tracking=tracking, num_figures=0))
    assert first["identification"].ap_r_vol.value == pytest.approx(
        told[0]["differences"]["identification"]["ap_r_vol"]["value"] / 100
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full", "full: expected the name of one run, got that of 2; choose of "),
        ("nothing", r"nothing: there is no such folder, and no such run of experiment 'test'"),
        ("0" * 32, "Run with id=0+ not found"),
        ("params.x = 3", "MLflow at .*: Expected a quoted string value"),
        ("attributes.run_name = 'full' and tags.workflow != 'x'", "results: expected two or more"),
    ],
)
def test_what_mlflow_has_not_is_named(tracking: TrackingConfig, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(config_of([name], tmp_path, tracking=tracking))


def test_no_database_is_made(ablation: Path, tmp_path: Path) -> None:
    config = config_of([ablation / "fool"], tmp_path, tracking=TrackingConfig(f"sqlite:///{tmp_path}/none.db"))
    with pytest.raises(FileNotFoundError, match=r"no such folder, and no MLflow database .*none\.db"):
        compare(config)
    assert not list(tmp_path.iterdir())
    with pytest.raises(JobError, match=r"MLflow at http://127\.0\.0\.1:9: "):
        compare(replace(config, tracking=TrackingConfig("http://127.0.0.1:9")))


def test_other_data_is_refused_unless_asked_for(ablation: Path, tmp_path: Path) -> None:
    other = changed(ablation, tmp_path / "other", data_digest="0123456789abcdef")
    config = config_of([ablation / "full", other], tmp_path / "out", num_figures=0)
    with pytest.raises(
        ValueError, match=r"expected results on the same data, got those of .* and 0123456789ab; --across"
    ):
        compare(config)
    assert len(compare(replace(config, across_data=True))) == 1
    write_records(other / "records.arrow", read_records(other / "records.arrow")[1:])
    with pytest.raises(ValueError, match=r"full \(first\) and .*other \(second\): expected records of the same images"):
        compare(replace(config, across_data=True))


def test_what_is_no_result_is_named(ablation: Path, tmp_path: Path) -> None:
    full, torn = ablation / "full", tmp_path / "torn"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"run: has no results\.json .*evaluate it first, with --checkpoint"):
        compare(config_of([full, tmp_path / "run"], tmp_path / "out"))
    shutil.copytree(full, torn)
    (torn / "results.json").write_text('{"metrics": ')
    with pytest.raises(ValueError, match=r"torn/results\.json: damaged"):
        compare(config_of([full, torn], tmp_path / "out"))
    (torn / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"torn/results\.json: has no 'metrics'"):
        compare(config_of([full, torn], tmp_path / "out"))
    with pytest.raises(ValueError, match="results: expected each once"):
        compare(config_of([full, f"{full}/"], tmp_path / "out"))


def test_an_image_that_comes_out_otherwise_is_not_drawn(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by other code: here the settings are changed after the fact."""
    config = json.loads((ablation / "full" / "results.json").read_text())["config"]
    nothing = config["model"] | {"semantic_crf": config["model"]["semantic_crf"] | {"num_iterations": 0}}
    other = changed(ablation, tmp_path / "other", config=config | {"model": nothing})
    gone = changed(ablation, tmp_path / "gone", config=config | {"data": str(tmp_path / "gone")})
    compare(config_of([ablation / "identification", other], tmp_path / "out"))
    said = capsys.readouterr().err
    assert "other does not come to what it recorded" in said
    compare(config_of([ablation / "identification", gone], tmp_path / "out"))
    assert "warning: no more images of" in capsys.readouterr().err
