"""What limits a network, and its errors by kind: text, JSON and metrics. All numbers but counts are percentages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from instseg.evaluation import oracles
from instseg.evaluation.errors import ErrorKind
from instseg.report.tables import Evaluation, Table, align, write_json
from instseg.storage import Place, StoragePath

THRESHOLDS = (0.5, 0.7, 0.9)  # the columns of the table


class OracleRow(NamedTuple):
    """A part of the system that the truth replaces.

    Attributes:
        name: In files and metrics.
        title: In tables.
        oracle: What replaces it.
        better: What would give as much, in words.
    """

    name: str
    title: str
    oracle: oracles.Oracle
    better: str


ORACLE_ROWS = (
    OracleRow("true_map", "true semantic map", oracles.true_map, "a better semantic network"),
    OracleRow("true_boxes", "true boxes", oracles.true_boxes, "better boxes"),
    OracleRow("true_foregrounds", "true masks as F_d", oracles.true_foregrounds, "better foregrounds"),
    OracleRow("true_scores", "true scores", oracles.true_scores, "better scores"),
    OracleRow("true_detections", "true detections", oracles.true_detections, "a better detector"),
    OracleRow(
        "true_map_and_detections",
        "true map and detections",
        oracles.true_map_and_detections,
        "a better semantic network and detector together",
    ),
)
ERROR_TITLES = {
    "class": "wrong class",
    "mask_0.1": "bad mask, IoU .1 to .3",
    "mask_0.3": "bad mask, IoU .3 to .5",
    "both": "wrong class and bad mask",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed",
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What limits a network on a split.

    Attributes:
        as_it_is: Its evaluation.
        replaced: The evaluations of `ORACLE_ROWS` by name.
        errors: Its errors by kind.
    """

    as_it_is: Evaluation
    replaced: Mapping[str, Evaluation]
    errors: Mapping[str, ErrorKind]

    def metrics(self) -> dict[str, float]:
        """Percentages, and counts of errors, by name."""
        values: dict[str, float] = {}
        for name, evaluation in {"as_it_is": self.as_it_is, **self.replaced}.items():
            values |= {f"{name}/{column}": value for column, value in _scores(evaluation).items()}
        for name, evaluation in self.replaced.items():
            values[f"{name}/ap_r_vol_gain"] = self.gain(evaluation)
        for kind, found in self.errors.items():
            values |= {f"errors/{kind}/count": found.count, f"errors/{kind}/ap_r_0.5_gain": 100 * found.gain}
        return values

    def text(self) -> str:
        """Both tables, and what each part is worth in one sentence."""
        return "\n".join([*align(self.oracle_table()), "", self.worth(), "", *align(self.error_table())])

    def oracle_table(self) -> Table:
        """The scores with each part replaced by the truth."""
        thresholds = [f"{t:.1f}".lstrip("0") for t in THRESHOLDS]
        table = [["replaced by the truth: AP^r [%]", *thresholds, "vol", "gain", "mIoU"]]
        table.append(self._row("nothing", self.as_it_is))
        return table + [self._row(row.title, self.replaced[row.name]) for row in ORACLE_ROWS]

    def error_table(self) -> Table:
        """The errors by kind."""
        errors = [["errors at a mask IoU of .5", "count", "AP^r .5 gained without"]]
        return errors + [
            [ERROR_TITLES[kind], str(found.count), f"{100 * found.gain:+.1f}"] for kind, found in self.errors.items()
        ]

    def _row(self, title: str, evaluation: Evaluation) -> list[str]:
        *scores, mean_iou = (f"{value:.1f}" for value in _scores(evaluation).values())
        gain = "" if evaluation is self.as_it_is else f"{self.gain(evaluation):+.1f}"
        return [title, *scores, gain, mean_iou]

    def gain(self, evaluation: Evaluation) -> float:
        """Points of AP^r_vol that an evaluation has more than the network as it is."""
        return 100 * (evaluation.ap_r["sds"].mean_volume - self.as_it_is.ap_r["sds"].mean_volume)

    def worth(self) -> str:
        """The parts in one sentence, the most worthwhile first."""
        # The truth in one place may cost points, as the rest was not made for it: a bound of 0.
        gains = [(max(self.gain(self.replaced[row.name]), 0.0), row.better) for row in ORACLE_ROWS]
        (most, first), *others = sorted(gains, key=lambda pair: -pair[0])
        be = "are" if first.startswith("better") else "is"
        worth = [f"{first} {be} worth up to {most:.0f} points of AP^r_vol"]
        sentence = ", ".join(worth + [f"{better} {gain:.0f}" for gain, better in others])
        return f"{sentence[0].upper()}{sentence[1:]}."


def _scores(evaluation: Evaluation) -> dict[str, float]:
    metrics = evaluation.metrics()
    names = (*(f"ap_r_{t}" for t in THRESHOLDS), "ap_r_vol", "mean_iou_after")
    return {name: metrics[name] for name in names}


def write_diagnosis(diagnosis: Diagnosis, out: Place) -> StoragePath:
    """Write diagnosis.json into the folder `out`; its path."""
    path = StoragePath.of(out) / "diagnosis.json"
    num_images = diagnosis.as_it_is.num_images
    write_json(path, {"unit": "percent", "num_images": num_images, "metrics": diagnosis.metrics()})
    return path
