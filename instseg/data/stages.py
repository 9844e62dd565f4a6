"""The stages that a shard goes through as a whole: read -> detect -> segment -> foreground (-> predict) -> write."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from instseg.data.foreground import compute_foregrounds
from instseg.data.images import ROTATED, decode_photograph
from instseg.data.network_outputs import DetectionRecord, import_detections, read_logits
from instseg.data.quarantine import CorruptItemError, LeftOut, QuarantineRow, blame
from instseg.data.schema import (
    SCHEMA,
    decode_detections,
    decode_row,
    encode_detections,
    encode_logits,
    encode_prediction,
    encode_row,
)
from instseg.data.shards import ShardPlan, ShardReport, ShardTask, find_shard, write_shard
from instseg.data.source import Item
from instseg.structures import Detections, InstanceMap, Sample


@dataclass
class Draft:
    """A shard on its way: the rows so far, and what happened to the images that have none.

    Attributes:
        task: What it will be.
        rows: Of `SCHEMA`; what a later stage fills in is null or empty.
        quarantined: The bad items so far.
        notes: As of `ShardReport`.
        seconds: What each stage took.
        report: Of the shard if it was there already; then there are no rows.
        digest: Of what the shard depends on, where that is the plan's and the content of its own inputs.
    """

    task: ShardTask
    rows: list[dict[str, Any]] = field(default_factory=list)
    quarantined: list[QuarantineRow] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    report: ShardReport | None = None
    digest: str = ""

    @property
    def kept(self) -> bool:
        """Whether the shard was there already."""
        return self.report is not None

    def encode(self) -> dict[str, Any]:
        """Two values that any process can read, for `decode`."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA) as stream:
            stream.write_table(pa.Table.from_pylist(self.rows, SCHEMA))
        fields = {name: value for name, value in self.__dict__.items() if name != "rows"}
        rest = json.dumps(fields, default=asdict)
        return {"rows": sink.getvalue().to_pybytes(), "rest": rest}

    @staticmethod
    def decode(values: dict[str, Any]) -> Draft:
        """The draft that `encode` made the values of."""
        rest = json.loads(values["rest"])
        return Draft(
            task=ShardTask(**rest["task"]),
            rows=pa.ipc.open_stream(values["rows"]).read_all().to_pylist(),
            quarantined=[QuarantineRow(**row) for row in rest["quarantined"]],
            notes=Counter(rest["notes"]),
            seconds=rest["seconds"],
            report=None if rest["report"] is None else ShardReport.of_json(rest["report"]),
            digest=rest["digest"],
        )

    def fill(self, stage: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Put `change(row)`'s fields into each row; an image for which that fails is quarantined."""
        start, rows = time.perf_counter(), []
        for row in self.rows:
            try:
                with blame(row["image_id"], f"stage {stage}"):
                    rows.append(row | change(row))
            except CorruptItemError as error:
                self.quarantined.append(error.row)
        self.rows = rows
        self.seconds[stage] = time.perf_counter() - start


def read(plan: ShardPlan, task: ShardTask) -> Draft:
    """Images, ground truth, and the detections and logits of other systems; nothing if the shard is there already."""
    start, draft = time.perf_counter(), Draft(task, report=find_shard(plan, task))
    if not draft.kept:
        read_items(plan, draft)
    draft.seconds["read"] = time.perf_counter() - start
    return draft


def read_items(plan: ShardPlan, draft: Draft) -> None:
    """Fill a draft with the rows of its images, without foregrounds."""
    for item, records in draft.task.items:
        try:
            draft.rows.append(_read_item(plan, item, records, draft))
        except LeftOut as rule:
            draft.notes[f"left out: {rule}"] += 1
        except CorruptItemError as error:
            draft.quarantined.append(error.row)


def _read_item(plan: ShardPlan, item: Item, records: list[DetectionRecord], draft: Draft) -> dict[str, Any]:
    with blame(item.image_id, "image"):
        picture = plan.source.read_image(item)
        size = picture.pixels.shape[:2]
        truth = plan.source.read_truth(item, size)
        if ROTATED in picture.notes and (records or plan.logits is not None):
            raise ValueError("has an EXIF orientation: nobody knows whether its detections and logits are upright")
        num_labels = len(plan.source.classes)
        logits = None if plan.logits is None else read_logits(plan.logits, item.image_id, num_labels)
        detections, bad = import_detections(item.image_id, records, size, plan.source.categories, plan.min_score)
        draft.quarantined += bad
        draft.notes.update(picture.notes)
        sample = Sample(item.image_id, picture.pixels, detections, *(truth or ()), logits=logits)
        return encode_row(sample, picture.content, None, item.source)


def detect(draft: Draft, detector: Callable[[np.ndarray], Detections]) -> Draft:
    """Detections by a network: of an (H, W, 3) uint8 RGB image, without foregrounds."""

    def detected(row: dict[str, Any]) -> dict[str, Any]:
        return {"detections": encode_detections(detector(_pixels(row)), None)}

    draft.fill("detect", detected)
    return draft


def segment(draft: Draft, network: Callable[[np.ndarray], np.ndarray]) -> Draft:
    """Logits by a network: (L, h, w) at any resolution, of an (H, W, 3) uint8 RGB image."""

    def segmented(row: dict[str, Any]) -> dict[str, Any]:
        return {"semantic_logits": encode_logits(network(_pixels(row)))}

    draft.fill("segment", segmented)
    return draft


def predict(draft: Draft, network: Callable[[Sample], InstanceMap]) -> Draft:
    """Instances in the place of the true ones, and those detections that they came from."""

    def predicted(row: dict[str, Any]) -> dict[str, Any]:
        return encode_prediction(network(decode_row(row)), row["detections"])

    draft.fill("predict", predicted)
    return draft


def foreground(plan: ShardPlan, draft: Draft) -> Draft:
    """Foregrounds of all detections."""

    def with_foregrounds(row: dict[str, Any]) -> dict[str, Any]:
        detections = decode_detections(row["detections"], row["height"], row["width"])
        computed = compute_foregrounds(_pixels(row), detections, row["image_id"], plan.grabcut)
        return {"detections": encode_detections(*computed)}

    draft.fill("foreground", with_foregrounds)
    return draft


def write(plan: ShardPlan, draft: Draft) -> ShardReport:
    """The shard and its report, unless they are there.

    Raises:
        OSError: If they cannot be written.
    """
    start = time.perf_counter()
    report = draft.report or write_shard(plan, draft.task, draft.rows, draft.quarantined, draft.notes)
    draft.seconds["write"] = time.perf_counter() - start
    return report


def _pixels(row: dict[str, Any]) -> np.ndarray:
    return decode_photograph(row["image"]).pixels
