"""Results side by side: which is better, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instseg.evaluation.ap_r import ImageRecord, ap_r
from instseg.evaluation.significance import Comparison, Difference
from instseg.report.ablation import PAPER_COLUMNS, PAPER_ROWS, difference_record, format_interval
from instseg.report.provenance import flatten
from instseg.report.tables import RULES, Table, format_cell

_UNSEEN = ("out", "tracking", "num_actors", "num_figures", "diagnose")  # settings that change no number


@dataclass(frozen=True, eq=False)
class Result:
    """What an evaluation left.

    Attributes:
        name: In tables and sentences.
        content: Of its results.json: `metrics`, `config`, `data_digest`, `commit`, …
        records: Of all images, sorted by id.
    """

    name: str
    content: dict[str, Any]
    records: tuple[ImageRecord, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers; percentages unless the name says otherwise. NaN where there is nothing to score."""
        numbers = {name: np.nan if value is None else value for name, value in self.content["metrics"].items()}
        return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}

    @property
    def settings(self) -> dict[str, str]:
        """Flattened with dots: the configuration, and the code, data and versions behind the numbers."""
        origin = {name: self.content.get(name) for name in ("commit", "data_digest", "versions")}
        return flatten({**self.content["config"], **origin})

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, [0] is "background"."""
        return tuple(row["class"] for row in self.content["per_class"])


def verdict(first: Result, other: Result, comparison: Comparison) -> str:
    """A sentence: whether `other` is better than `first` by AP^r_vol, which it is if the interval is above 0."""
    value, low, high = (100 * number for number in comparison.ap_r_vol)
    num_images = f"{comparison.num_images} images"
    if np.isnan(value):
        return f"Nothing can be said of {other.name}: there is no ground truth in the {num_images}."
    if low <= 0 <= high:
        interval = f"{value:+.1f} AP^r_vol (95 % {low:+.1f} to {high:+.1f}, {num_images})"
        return f"No difference can be shown: {other.name} - {first.name} is {interval}."
    word, *numbers = ("better", value, low, high) if value > 0 else ("worse", -value, -high, -low)
    by, least, most = (f"{number:.1f}" for number in numbers)
    return f"{other.name} is {word} than {first.name} by {by} AP^r_vol (95 % {least} to {most}, {num_images})."


def letters(results: Sequence[Result]) -> list[str]:
    """A, B, …, Z, 27, 28, …: what tables call the results."""
    return [chr(ord("A") + index) if index < 26 else str(index + 1) for index in range(len(results))]


def legend(results: Sequence[Result]) -> Table:
    """Which letter is which result."""
    named = zip(letters(results), results, strict=True)
    return [["result", "images"], *([f"{letter}  {result.name}", str(len(result.records))] for letter, result in named)]


def metric_table(results: Sequence[Result], comparisons: Sequence[Comparison]) -> Table:
    """Each number of each result, then its difference to the first, with the 95 % interval where there is one.

    Args:
        results: At least two.
        comparisons: Of the first with each other.
    """
    others, (a, *names) = results[1:], letters(results)
    found = difference_record({other.name: comparison for other, comparison in zip(others, comparisons, strict=True)})
    table = [["[%]", a, *names, *(f"{name} - {a}" for name in names)]]
    seen = dict.fromkeys(name for result in results for name in result.metrics)
    for metric in seen:
        values = [result.metrics.get(metric, np.nan) for result in results]
        differences = [
            _difference(metric, found[other.name].get(metric), value - values[0])
            for other, value in zip(others, values[1:], strict=True)
        ]
        table.append([metric, *(_number(metric, value) for value in values), *differences])
    return table


def shorter(table: Table) -> Table:
    """What a terminal shows of `metric_table`: the matching rule of the tables alone."""
    others = tuple(f"{rule}/" for rule in RULES if rule != "sds")
    return [row for row in table if not row[0].startswith(others)]


def setting_table(results: Sequence[Result]) -> Table:
    """The settings that are not the same in all results."""
    settings = [result.settings for result in results]
    names = [name for name in dict.fromkeys(name for of_one in settings for name in of_one) if _seen(name)]
    rows = [[name, *(of_one.get(name, "–") for of_one in settings)] for name in names]
    return [["setting", *letters(results)], *(row for row in rows if len(set(row[1:])) > 1)]


def paper_table() -> Table:
    """The rows of the paper's Tables 1 and 2, for reference."""
    rows = [[title, *(format_cell(value) or "–" for value in values)] for title, values in PAPER_ROWS.items()]
    return [["the paper, VOC 2012 val, other networks", *PAPER_COLUMNS], *rows]


def changes(first: Result, other: Result) -> dict[str, tuple[float, float]]:
    """AP^r_vol of each image alone in both results, in percent, by image id; images without ground truth are left out.

    Duplicates and false positives count as far as they rank before what is right.
    """
    num_labels = len(first.classes)
    scores = [
        {record.image_id: 100 * ap_r([record], num_labels).mean_volume for record in result.records}
        for result in (first, other)
    ]
    return {image: (before, scores[1][image]) for image, before in scores[0].items() if not np.isnan(before)}


def largest(changes: Mapping[str, tuple[float, float]], num: int) -> list[str]:
    """`num` images with the largest change, ascending: as many that lost as that gained, where there are."""
    ordered = sorted(changes, key=lambda image: changes[image][1] - changes[image][0])
    lost = [image for image in ordered if changes[image][1] < changes[image][0]]
    gained = [image for image in ordered if changes[image][1] > changes[image][0]]
    num_lost = min(len(lost), max(num // 2, num - len(gained)))
    return lost[:num_lost] + gained[::-1][: num - num_lost][::-1]


def comparison_record(results: Sequence[Result], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All of it for JSON."""
    first, *others = results
    found = dict(zip((other.name for other in others), comparisons, strict=True))
    return {
        "unit": "percent",
        "first": first.name,
        "verdicts": [verdict(first, other, found[other.name]) for other in others],
        "metrics": {result.name: result.metrics for result in results},
        "differences": difference_record(found),
        "settings": {row[0]: row[1:] for row in setting_table(results)[1:]},
        "changes": {other.name: changes(first, other) for other in others},
    }


def _difference(metric: str, interval: dict[str, float] | None, plain: float) -> str:
    if interval is None:
        return _number(metric, plain, "+")
    return format_interval(Difference(*(interval[name] / 100 for name in Difference._fields)))


def _number(metric: str, value: float, sign: str = "") -> str:
    return "–" if np.isnan(value) else f"{value:{sign}{'.3f' if metric.endswith('nats') else '.1f'}}"


def _seen(name: str) -> bool:
    return not any(name == part or name.startswith(f"{part}.") for part in _UNSEEN)
