from __future__ import annotations

import numpy as np
import pytest

from instseg.evaluation.errors import HIT, image_errors
from instseg.report.gallery import Selection, gallery
from tests.report.reports import CLASSES, HOSTILE, NUM_IMAGES, shown_and_samples


@pytest.fixture(scope="module")
def offered():
    return shown_and_samples()


def test_half_of_the_selection_is_the_worst_whatever_the_order(offered) -> None:
    shown, _ = offered
    worst = sorted(shown, key=lambda one: (one.quality, one.record.image_id))
    rng, chosen = np.random.default_rng(0), []
    for _ in range(3):
        selection = Selection(7)
        for index in rng.permutation(len(shown)):
            selection.offer(shown[index])
            assert max(len(selection._worst), len(selection._any)) <= 7
        chosen.append([one.record.image_id for one in selection.chosen()])
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(set(chosen[0])) == 7
    qualities = [one.quality for one in worst]
    assert {one.record.image_id for one in worst if one.quality < qualities[3]} <= set(chosen[0])
    others = [one.quality for one in worst if one.record.image_id in chosen[0]]
    assert others == sorted(others)
    assert max(others) > qualities[6]  # not the worst seven


def test_no_more_images_than_there_are(offered) -> None:
    shown, _ = offered
    for num, expected in ((0, 0), (1, 1), (100, NUM_IMAGES)):
        selection = Selection(num)
        for one in shown:
            selection.offer(one)
        assert len(selection.chosen()) == expected


def test_some_are_the_same_in_every_run(offered) -> None:
    shown, _ = offered
    names = []
    for num, order in ((4, shown), (100, shown[::-1])):
        selection = Selection(num)
        for one in order:
            selection.offer(one)
        names.append([one.record.image_id for one in selection.same(4)])
    assert names[0] == names[1]
    assert len(set(names[0])) == 4


def test_an_image_says_what_failed_and_lists_its_detections(offered) -> None:
    shown, samples = offered
    (one,) = [one for one in shown if HOSTILE in one.record.image_id]
    section = gallery([one], [samples[one.record.image_id]], 1, CLASSES)
    html = "".join(section.blocks)
    assert "<script" not in html
    errors = image_errors(one.record)
    kinds = {*errors.kinds.tolist()} - {HIT} | ({"missed"} if errors.missed.any() else set())
    assert kinds
    assert f'data-kinds="{" ".join(sorted(kinds))}"' in html
    assert html.count("<tr>") == 1 + len(one.record.detection_scores)
    for score, validity in zip(one.record.detection_scores, one.record.validity, strict=True):
        assert f"<td>{score:.3f}</td><td>{validity:.3f}</td>" in html
