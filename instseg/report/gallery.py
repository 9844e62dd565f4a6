"""The gallery of a page: images with what was made of them, to be sorted by score and filtered by class and failure."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_hex

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.errors import HIT, KINDS, image_errors
from instseg.evaluation.panoptic import image_quality
from instseg.report.cells import shrink
from instseg.report.colours import paired_colours
from instseg.report.diagnosis import ERROR_TITLES
from instseg.report.page import Section, folded, note, table
from instseg.report.thumbnails import thumbnails
from instseg.structures import InstanceMap, Sample

_NO_ERROR = "none"
_KIND_TITLES = {_NO_ERROR: "no error", **ERROR_TITLES}
_HOW = (
    "An image's score is its panoptic quality. A box and its instance have the colour of the true instance that they "
    "cover most; a dotted box became no instance. Void is pale."
)
_ORDERS = {"worst": "worst first", "best": "best first", "name": "by name"}


class Shown(NamedTuple):
    """An image of a gallery: its record, and the instances no larger than `cells.MAX_SIDE`."""

    record: ImageRecord
    predicted: InstanceMap

    @property
    def quality(self) -> float:
        """Panoptic quality of the image in 0..1; 1 where there is nothing and nothing was found."""
        return float(np.nan_to_num(image_quality(self.record), nan=1.0))


class Selection:
    """Chooses images as they come, in any order, and holds no more than twice as many as it will have chosen.

    Half of them are the worst, half are any others, which the hashes of their ids decide.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._worst: list[tuple[float, str, Shown]] = []
        self._any: list[tuple[float, str, Shown]] = []

    def offer(self, shown: Shown) -> None:
        """One image; each once."""
        name = shown.record.image_id
        draw = hashlib.sha256(name.encode()).digest()
        for heap, rank in ((self._worst, shown.quality), (self._any, int.from_bytes(draw[:6]))):
            heapq.heappush(heap, (-float(rank), name, shown))
            if len(heap) > self._num:
                heapq.heappop(heap)

    def chosen(self) -> list[Shown]:
        """Worst first."""
        worst = [shown for *_, shown in sorted(self._worst, reverse=True)[: -(-self._num // 2)]]
        names = {shown.record.image_id for shown in worst}
        others = [shown for _, name, shown in sorted(self._any, reverse=True) if name not in names]
        return sorted(worst + others[: self._num - len(worst)], key=lambda one: (one.quality, one.record.image_id))

    def same(self, num: int) -> list[Shown]:
        """So many, the same of the same images whatever was made of them."""
        return [shown for *_, shown in sorted(self._any, reverse=True)[:num]]


def gallery(shown: Sequence[Shown], samples: Iterable[Sample], num_images: int, classes: Sequence[str]) -> Section:
    """A section of a page.

    Args:
        shown: Images that `Selection` chose.
        samples: Of the same images, in the same order; one is held at a time.
        num_images: That there are.
        classes: Class names, [0] is "background".
    """
    kinds = [_kinds(one.record) for one in shown]
    labels = [sorted({*one.record.truth_labels.tolist(), *one.record.labels.tolist()}) for one in shown]
    counts = Counter(kind for of_image in kinds for kind in of_image), Counter(x for own in labels for x in own)
    of_labels = {str(label): f"{classes[label]} ({counts[1][label]})" for label in sorted(counts[1])}
    of_kinds = {kind: f"{title} ({counts[0][kind]})" for kind, title in _KIND_TITLES.items() if counts[0][kind]}
    controls = "".join(
        [
            _select("sort", "Order", _ORDERS),
            _select("label", "Class", {"": "all", **of_labels}),
            _select("kind", "Failure", {"": "all", **of_kinds}),
        ]
    )
    part = "" if len(shown) == num_images else f", {len(shown)} of them here: half the worst, half any others"
    articles = [_article(*whole, classes) for whole in zip(shown, samples, map(sorted, kinds), labels, strict=True)]
    bar = f'<div class="controls" hidden>{controls}<output></output></div>'
    return Section(
        "images",
        "Images",
        [note(f"{num_images} images{part}. {_HOW}"), f'<div class="gallery">{bar}{"".join(articles)}</div>'],
    )


def _kinds(record: ImageRecord) -> set[str]:
    errors = image_errors(record)
    return ({*errors.kinds.tolist()} - {HIT}) | ({"missed"} if errors.missed.any() else set()) or {_NO_ERROR}


def _article(shown: Shown, sample: Sample, kinds: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> str:
    record, small = shown.record, shrink(sample)
    colours, true_colours = paired_colours(shown.predicted, small.instances, len(small.instance_labels))
    name = escape(record.image_id)
    data = f'data-name="{name}" data-score="{shown.quality:.6f}"'
    data += f' data-labels="{" ".join(map(str, labels))}" data-kinds="{" ".join(kinds)}"'
    chips = "".join(f'<span class="chip">{escape(text)}</span>' for text in _failures(record, classes))
    head = f"<h3>{name}<span>panoptic quality {100 * shown.quality:.1f} %</span>{chips}</h3>"
    pictures = "".join(thumbnails(small, shown.predicted, classes, colours, true_colours))
    return (
        f'<article {data}>{head}<div class="pictures">{pictures}</div>{_detections(shown, colours, classes)}</article>'
    )


def _failures(record: ImageRecord, classes: Sequence[str]) -> list[str]:
    """The kinds of failure, each with the classes that it is about."""
    errors = image_errors(record)
    of_kind = {kind: record.labels[errors.kinds == kind] for kind in KINDS}
    of_kind["missed"] = record.truth_labels[errors.missed]
    return [
        f"{ERROR_TITLES[kind]}: "
        + ", ".join(_counted(classes[int(label)], num) for label, num in sorted(counts.items()))
        for kind, found in of_kind.items()
        if (counts := Counter(found.tolist()))
    ]


def _counted(name: str, num: int) -> str:
    return name if num == 1 else f"{num} × {name}"


def _detections(shown: Shown, colours: np.ndarray, classes: Sequence[str]) -> str:
    record, instances = shown.record, shown.predicted
    instance_of = {int(d): k for k, d in enumerate(instances.detection_indices.tolist(), 1)}
    rows, marks = [["detection", "score", "Pr(Y)", "found an object", "instance's score"]], list[str]()
    for d in np.argsort(-record.detection_scores, kind="stable").tolist():
        instance = instance_of.get(d)
        scores = f"{record.detection_scores[d]:.3f}", f"{record.validity[d]:.3f}"
        rank = "–" if instance is None else f"{instances.scores[instance - 1]:.3f}"
        rows.append([classes[int(record.detection_labels[d])], *scores, "yes" if record.matched[d] else "no", rank])
        marks.append("" if instance is None else to_hex(colours[instance]))
    return folded(f"Detections ({len(marks)})", [table(rows, colours=marks)]) if marks else note("no detections")


def _select(name: str, title: str, options: dict[str, str]) -> str:
    inside = "".join(f'<option value="{escape(value)}">{escape(said)}</option>' for value, said in options.items())
    return f'<label>{escape(title)} <select name="{name}">{inside}</select></label>'
