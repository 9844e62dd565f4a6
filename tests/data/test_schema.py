from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from instseg.data.schema import SCHEMA, decode_instances, decode_row, encode_instances, encode_row
from instseg.structures import Detections, Sample

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)


def _sample(foregrounds: np.ndarray, **fields: object) -> tuple[Sample, bytes]:
    num, height, width = foregrounds.shape
    buffer = io.BytesIO()
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(image).save(buffer, "PNG")
    boxes = np.tile(np.array([0.25, 0, 1, 0.5], np.float32), (num, 1))
    detections = Detections(np.arange(1, num + 1), np.full(num, 0.3, np.float32), boxes, foregrounds)
    return Sample("an id", image, detections, **fields), buffer.getvalue()  # pyright: ignore[reportArgumentType]


def _through_parquet(row: dict) -> dict:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row], SCHEMA), buffer)
    return pq.read_table(buffer).to_pylist()[0]


def test_every_column_survives_parquet() -> None:
    rng = np.random.default_rng(1)
    foregrounds = rng.random((3, 5, 7)) < 0.4
    foregrounds[1] = False
    semantic = rng.choice(np.array([0, 1, 2, 255], np.uint8), (5, 7))
    instances = rng.integers(-1, 3, (5, 7)).astype(np.int32)
    logits = rng.normal(size=(4, 2, 3)).astype(np.float16)
    sample, file = _sample(
        foregrounds, semantic=semantic, instances=instances, instance_labels=np.array([2, 0]), logits=logits
    )
    row = _through_parquet(encode_row(sample, file, ["grabcut", "grabcut", "box"], "voc"))
    assert set(row) == set(SCHEMA.names)
    assert (row["source"], row["height"], row["width"], row["image"]) == ("voc", 5, 7, file)
    assert [entry["foreground_source"] for entry in row["detections"]] == ["grabcut", "grabcut", "box"]
    np.testing.assert_array_equal(coco_mask.decode(row["detections"][0]["foreground"]), foregrounds[0])

    back = decode_row(row)
    assert back.image_id == "an id"
    for name in ("image", "semantic", "instances", "instance_labels", "logits"):
        expected, got = getattr(sample, name), getattr(back, name)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
    for name in ("labels", "scores", "boxes", "foregrounds"):
        expected, got = getattr(sample.detections, name), getattr(back.detections, name)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_what_is_unknown_stays_unknown() -> None:
    sample, file = _sample(np.zeros((0, 4, 6), np.bool_))
    back = decode_row(_through_parquet(encode_row(sample, file, [], "voc")))
    assert (back.semantic, back.instances, back.logits) == (None, None, None)
    assert back.instance_labels.shape == (0,)
    assert back.detections.foregrounds is not None
    assert back.detections.foregrounds.shape == (0, 4, 6)


def test_a_row_needs_foregrounds() -> None:
    sample, file = _sample(np.ones((1, 2, 2), np.bool_))
    with pytest.raises(ValueError, match="one source for each"):
        encode_row(sample, file, [], "voc")


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))))
def test_any_foreground_survives(foregrounds: np.ndarray) -> None:
    sample, file = _sample(foregrounds)
    back = decode_row(encode_row(sample, file, ["grabcut"] * len(foregrounds), "voc"))
    np.testing.assert_array_equal(back.detections.foregrounds, foregrounds)


@given(hnp.arrays(np.int32, SHAPES, elements=st.one_of(st.integers(-1, 300), st.integers(65000, 65534))))
def test_any_instance_map_survives(instances: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_instances(encode_instances(instances)), instances)


@pytest.mark.parametrize(("highest", "mode"), [(254, "L"), (255, "I;16"), (65534, "I;16")])
def test_sixteen_bits_where_needed(highest: int, mode: str) -> None:
    instances = np.array([[0, -1, highest]], np.int32)
    content = encode_instances(instances)
    assert Image.open(io.BytesIO(content)).mode == mode
    np.testing.assert_array_equal(decode_instances(content), instances)


@pytest.mark.parametrize("value", [-2, 65535])
def test_refuses_ids_that_no_png_holds(value: int) -> None:
    with pytest.raises(ValueError, match=r"expected ids in -1\.\.65534"):
        encode_instances(np.array([[value]], np.int32))
