"""A look at prepared data directories, as a user takes it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from instseg.config import InspectConfig
from instseg.jobs.inspect import choose, inspect
from tests.jobs.ending import check_ending


def test_a_look_counts_all_images_and_shows_some(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect(InspectConfig(str(tiny_data), str(tmp_path / "new" / "out"), num_samples=4))
    said = capsys.readouterr().out
    assert (found.num_images, sum(found.detections.values()), sum(found.instances.values())) == (7, 8, 14)
    assert re.search(r"^images +7$", said, re.MULTILINE)
    assert re.search(r"^all +14 +8$", said, re.MULTILINE)
    assert "contact sheet of 4 images" in said
    check_ending(said)
    with Image.open(tmp_path / "new/out/contact_sheet.png") as picture:
        assert picture.format == "PNG"
    page = (tmp_path / "new/out/contact_sheet.html").read_text()
    shown = [index for index in range(7) if f"<h3>image_{index}</h3>" in page]
    assert shown == choose([f"image_{index}" for index in range(7)], 4, seed=0)
    assert found.digest in page


def test_one_image_of_no_detections_and_more_asked_than_there_are(
    write_data: Callable[[Path, Iterable[int]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect(InspectConfig(str(write_data(tmp_path, [0])), str(tmp_path / "out"), num_samples=200))
    assert found.detections_per_image == (0, 0, 0)
    assert set(found.detections.values()) == {0}
    assert "contact sheet of 1 images" in capsys.readouterr().out


def test_images_are_chosen_by_their_ids_and_the_seed_alone() -> None:
    ids = [f"image {index}" for index in range(50)]
    chosen = choose(ids, 9, seed=1)
    assert len({*chosen}) == 9
    assert chosen == sorted(chosen)
    assert {ids[index] for index in chosen} == {ids[::-1][index] for index in choose(ids[::-1], 9, seed=1)}
    assert choose(ids, 9, seed=2) != chosen
    assert {*chosen} < {*choose(ids, 10, seed=1)}
    assert choose(ids, 51, seed=1) == list(range(50))
    assert {index for seed in range(60) for index in choose(ids, 9, seed)} == set(range(50))


@pytest.mark.parametrize("num", [0, 201])
def test_a_sheet_of_none_or_too_many_is_refused(num: int) -> None:
    with pytest.raises(ValueError, match=rf"^num_samples: expected 1 to 200 images.*, got {num}"):
        InspectConfig("d", "o", num_samples=num)


def test_it_takes_seconds_as_neither_ray_nor_torch_is_imported(tiny_data: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from instseg.jobs.command_line import inspect\n"
        f"sys.argv = ['inspect', '--data', {str(tiny_data)!r}, '--out', {str(tmp_path)!r}]\n"
        "inspect()\n"
        "print('imported', *{'torch', 'ray', 'mlflow'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "imported", done.stdout + done.stderr
