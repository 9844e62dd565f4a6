"""Predictions in COCO's formats: what they say of each image, in Parquet shards, and one JSON of all shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instseg.data.voc import voc_palette
from instseg.storage import StoragePath
from instseg.structures import InstanceMap

RESULTS, IMAGES, PANOPTIC = "predictions.json", "images.json", "panoptic.json"
_FILE = pa.struct([pa.field("name", pa.string()), pa.field("sha256", pa.string())])
SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),  # JSON, an entry of IMAGES
        pa.field("results", pa.list_(pa.string()), nullable=False),  # JSON, entries of RESULTS
        pa.field("panoptic", pa.string()),  # JSON, an annotation of PANOPTIC
        pa.field("files", pa.list_(_FILE), nullable=False),  # relative to the output folder
    ]
)


def part_row(row: dict[str, Any], number: int, file_name: str, found: InstanceMap, panoptic: bool) -> dict[str, Any]:
    """A row of `SCHEMA`, but for its files.

    Args:
        row: Of a prepared image.
        number: Its id, as COCO's are numbers; one that comes from COCO keeps its own.
        file_name: Of the image.
        found: Its instances.
        panoptic: Whether PANOPTIC will be written.
    """
    name = row["image_id"]
    id_ = int(name) if row["source"] == "coco" and name.isdecimal() else number
    image = {"id": id_, "file_name": file_name, "height": row["height"], "width": row["width"]}
    results = found.to_coco(id_)
    annotation = {"image_id": id_, "file_name": f"{name}.png", "segments_info": _segments(results, found)}
    return {
        "image": json.dumps(image),
        "results": [json.dumps(result) for result in results],
        "panoptic": json.dumps(annotation) if panoptic else None,
    }


def _segments(results: list[dict[str, Any]], found: InstanceMap) -> list[dict[str, Any]]:
    areas = np.bincount(found.instances.ravel(), minlength=len(found) + 1)[1:]
    return [
        {"id": k, "category_id": result["category_id"], "area": int(area), "bbox": result["bbox"], "iscrowd": 0}
        for k, (result, area) in enumerate(zip(results, areas, strict=True), 1)
    ]


def panoptic_pixels(found: InstanceMap) -> np.ndarray:
    """(H, W, 3) uint8, whose R + 256 G + 65536 B is the instance, 0 where there is none."""
    ids = found.instances
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)


def read_part(place: StoragePath, column: str) -> Iterator[Any]:
    """A column of a shard, row by row, of which one is in memory."""
    with place.open() as source, pq.ParquetFile(source, page_checksum_verification=True) as part:
        for group in range(part.num_row_groups):
            yield part.read_row_group(group, [column]).to_pylist()[0][column]


def merge_parts(out: StoragePath, parts: Sequence[StoragePath], classes: Sequence[str], panoptic: bool) -> None:
    """Write RESULTS, IMAGES and PANOPTIC of shards, in their order, an image at a time.

    Args:
        out: The folder to write to.
        parts: Shards.
        classes: Class names, [0] is background; a category's id is its label.
        panoptic: Whether PANOPTIC is written.
    """
    categories = [{"id": k, "name": name, "supercategory": name} for k, name in enumerate(classes) if k > 0]
    palette = np.reshape(voc_palette(), (-1, 3)).tolist()
    things = [category | {"isthing": 1, "color": palette[category["id"]]} for category in categories]

    def column(name: str) -> Iterator[Any]:
        return chain.from_iterable(read_part(part, name) for part in parts)

    def images() -> Iterator[str]:
        return chain(['{"images": ['], _lines(column("image")), ['],\n"annotations": ['])

    _write(out / RESULTS, chain(["["], _lines(chain.from_iterable(column("results"))), ["]\n"]))
    _write(out / IMAGES, chain(images(), [f'],\n"categories": {json.dumps(categories)}}}\n']))
    if panoptic:
        end = f'],\n"categories": {json.dumps(things)}}}\n'
        _write(out / PANOPTIC, chain(images(), _lines(column("panoptic")), [end]))


def _lines(values: Iterable[str]) -> Iterator[str]:
    """The elements of a JSON list."""
    for index, value in enumerate(values):
        yield f"{',' if index else ''}\n{value}"


def _write(place: StoragePath, pieces: Iterable[str]) -> None:
    with place.publishing() as file:
        file.writelines(piece.encode() for piece in pieces)
