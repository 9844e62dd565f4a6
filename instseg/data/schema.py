"""One Parquet row per image: encoded bytes and run lengths, for any Parquet reader."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask

from instseg.data.images import decode_image, decode_photograph
from instseg.structures import VOID, Detections, InstanceMap, Sample

FORMAT_VERSION = 2  # raise it whenever the same inputs would give other bytes

_RLE = pa.struct([pa.field("size", pa.list_(pa.int32(), 2)), pa.field("counts", pa.binary())])
_DETECTION = pa.struct(
    [
        pa.field("label", pa.int16()),
        pa.field("score", pa.float32()),
        pa.field("box", pa.list_(pa.float32(), 4)),  # xyxy pixels, half-open
        pa.field("foreground", _RLE),  # null until it is computed
        pa.field("foreground_source", pa.string()),  # "grabcut" or "box"
    ]
)
# Not a list of fixed size: pyarrow 25 cannot read those back from Parquet where the struct around them is null.
_LOGITS = pa.struct([pa.field("shape", pa.list_(pa.int32())), pa.field("data", pa.binary())])
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the original file
        pa.field("semantic", pa.binary()),  # PNG, 255 void
        pa.field("instances", pa.binary()),  # PNG, 8 bits with 255 void or 16 bits with 65535 void
        pa.field("instance_labels", pa.list_(pa.int16()), nullable=False),
        pa.field("detections", pa.list_(_DETECTION), nullable=False),
        pa.field("semantic_logits", _LOGITS),  # float16, little-endian, C order
    ]
)


def encode_row(sample: Sample, image_file: bytes, foreground_sources: list[str] | None, source: str) -> dict[str, Any]:
    """A row of `SCHEMA` from a sample.

    Args:
        sample: The sample; its `image` is the decoded `image_file`.
        image_file: The original JPEG or PNG bytes.
        foreground_sources: D times "grabcut" or "box"; None if the detections have no foregrounds yet.
        source: The data set that the image comes from, such as "voc".
    """
    height, width = sample.image.shape[:2]
    return {
        "image_id": sample.image_id,
        "source": source,
        "height": height,
        "width": width,
        "image": image_file,
        "semantic": None if sample.semantic is None else encode_png(sample.semantic),
        "instances": None if sample.instances is None else encode_instances(sample.instances),
        "instance_labels": sample.instance_labels.tolist(),
        "detections": encode_detections(sample.detections, foreground_sources),
        "semantic_logits": None if sample.logits is None else encode_logits(sample.logits),
    }


def decode_row(row: dict[str, Any]) -> Sample:
    """The sample of a row; the inverse of `encode_row`."""
    semantic, instances, logits = row["semantic"], row["instances"], row["semantic_logits"]
    return Sample(
        image_id=row["image_id"],
        image=decode_photograph(row["image"]).pixels,
        detections=decode_detections(row["detections"], row["height"], row["width"]),
        semantic=None if semantic is None else np.array(decode_image(semantic)),
        instances=None if instances is None else decode_instances(instances),
        instance_labels=np.array(row["instance_labels"], np.int64),
        logits=None if logits is None else np.frombuffer(logits["data"], "<f2").reshape(logits["shape"]).copy(),
    )


def encode_prediction(found: InstanceMap, detections: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a row in which predicted instances stand for the true ones.

    Args:
        found: K instances, with `semantic`.
        detections: The row's; those that became instances are kept, with the instances' scores.
    """
    assert found.semantic is not None  # for type checkers: networks compute it
    nothing = {"foreground": None, "foreground_source": None}
    kept = zip(found.detection_indices, found.scores, strict=True)
    return {
        "semantic": encode_png(found.semantic),
        "instances": encode_instances(found.instances),
        "instance_labels": found.labels.tolist(),
        "detections": [detections[index] | nothing | {"score": float(score)} for index, score in kept],
    }


def decode_prediction(row: dict[str, Any]) -> InstanceMap:
    """The instances that `encode_prediction` wrote; `detection_indices` are of those that the row has kept."""
    return InstanceMap(
        instances=decode_instances(row["instances"]),
        labels=np.array(row["instance_labels"], np.int64),
        scores=np.array([entry["score"] for entry in row["detections"]], np.float32),
        detection_indices=np.arange(len(row["detections"])),
        semantic=np.array(decode_image(row["semantic"])),
    )


def encode_instances(instances: np.ndarray) -> bytes:
    """PNG of an (H, W) int32 instance map with -1 void: 8 bits where every id is below 255, else 16 bits.

    Raises:
        ValueError: If an id is below -1 or above 65534.
    """
    low, high = int(instances.min(initial=0)), int(instances.max(initial=0))
    if low < VOID or high >= np.iinfo(np.uint16).max:
        raise ValueError(f"instances: expected ids in -1..65534, got {low}..{high}")
    dtype = np.uint8 if high < np.iinfo(np.uint8).max else np.uint16
    return encode_png(np.where(instances == VOID, np.iinfo(dtype).max, instances).astype(dtype))


def decode_instances(content: bytes) -> np.ndarray:
    """The (H, W) int32 instance map, -1 void; the inverse of `encode_instances`."""
    stored = np.array(decode_image(content))
    void = np.iinfo(np.uint8 if stored.dtype == np.uint8 else np.uint16).max
    return np.where(stored == void, VOID, stored.astype(np.int32)).astype(np.int32)


def encode_png(array: np.ndarray, palette: list[int] | None = None) -> bytes:
    """PNG of an (H, W) uint8 or uint16 or (H, W, 3) uint8 array; with a palette, of indices into it."""
    image, buffer = Image.fromarray(array), io.BytesIO()
    if palette is not None:
        image.putpalette(palette)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def encode_detections(detections: Detections, sources: list[str] | None) -> list[dict[str, Any]]:
    """The entries of a row for D detections, with what each foreground came from; None without foregrounds."""
    foregrounds = detections.foregrounds
    if sources is not None and (foregrounds is None or len(sources) != len(detections)):
        raise ValueError("detections: expected foregrounds and one source for each")
    return [
        {
            "label": int(detections.labels[index]),
            "score": float(detections.scores[index]),
            "box": detections.boxes[index].tolist(),
            "foreground": None
            if sources is None or foregrounds is None
            else coco_mask.encode(np.asfortranarray(foregrounds[index], np.uint8)),
            "foreground_source": None if sources is None else sources[index],
        }
        for index in range(len(detections))
    ]


def decode_detections(entries: list[dict[str, Any]], height: int, width: int) -> Detections:
    """The detections of a row whose image has that size; without foregrounds if one of them has none yet."""
    complete = all(entry["foreground"] is not None for entry in entries)
    foregrounds = np.zeros((len(entries), height, width), np.bool_) if complete else None
    if foregrounds is not None:
        for index, entry in enumerate(entries):
            foregrounds[index] = coco_mask.decode(entry["foreground"])
    return Detections(
        labels=np.array([entry["label"] for entry in entries], np.int64),
        scores=np.array([entry["score"] for entry in entries], np.float32),
        boxes=np.array([entry["box"] for entry in entries], np.float32).reshape(-1, 4),
        foregrounds=foregrounds,
    )


def encode_logits(logits: np.ndarray) -> dict[str, Any]:
    """A row's entry for (L, h, w) logits, as float16."""
    return {"shape": list(logits.shape), "data": np.ascontiguousarray(logits, "<f2").tobytes()}
