from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from instseg.data.images import ROTATED, decode_image, decode_photograph

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 17, 3)).astype(np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (11, 17)).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """(H, W, 1..4) uint16 as the chunks of a PNG, which Pillow cannot write for more than one channel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, num_channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[num_channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def oriented(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(Image.fromarray(PIXELS), kind, exif=exif)


def test_rgb_is_what_is_in_the_file() -> None:
    content = encode(Image.fromarray(PIXELS))
    image = decode_photograph(content)
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert (image.content, image.notes) == (content, ())
    jpeg = encode(Image.fromarray(PIXELS), "JPEG")
    np.testing.assert_array_equal(decode_photograph(jpeg).pixels, np.array(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_has_three_equal_channels(kind: str) -> None:
    content = encode(Image.fromarray(GREY), kind)
    image = decode_photograph(content)
    assert image.notes == ("converted to RGB from mode L",)
    expected = np.array(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(image.pixels, np.stack([expected] * 3, 2))


def test_cmyk_becomes_the_colours_it_prints() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan
    image = decode_photograph(encode(cmyk, "JPEG", quality=100))
    assert image.notes == ("converted to RGB from mode CMYK",)
    np.testing.assert_allclose(image.pixels, np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=4)


def test_a_palette_is_looked_up() -> None:
    palette = Image.fromarray(PIXELS).quantize(7)
    image = decode_photograph(encode(palette))
    assert image.notes == ("converted to RGB from mode P",)
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(image.pixels, colours[np.array(palette)])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_left_out(mode: str) -> None:
    opaque = Image.fromarray(PIXELS).convert(mode[:-1])
    seen = opaque.copy()
    opaque.putalpha(Image.fromarray(GREY))
    image = decode_photograph(encode(opaque))
    assert image.notes == (f"converted to RGB from mode {mode}",)
    np.testing.assert_array_equal(image.pixels, np.array(seen.convert("RGB")))


def test_one_bit_is_black_and_white() -> None:
    image = decode_photograph(encode(Image.fromarray(GREY > 127)))
    np.testing.assert_array_equal(image.pixels, np.where(GREY[..., None] > 127, [255] * 3, 0))


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_16_bits_are_refused(num_channels: int) -> None:
    pixels = np.random.default_rng(2).integers(0, 2**16, (5, 4, num_channels)).astype(np.uint16)
    content = png_of_16_bits(pixels)
    assert Image.open(io.BytesIO(content)).size == (4, 5)  # a PNG that Pillow reads
    with pytest.raises(ValueError, match="expected 8 bits a channel, got more"):
        decode_photograph(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_as_pillow_applies_it(orientation: int, kind: str) -> None:
    content = oriented(orientation, kind)
    image = decode_photograph(content)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(image.pixels, np.array(upright))
    assert image.pixels.shape == ((17, 11, 3) if orientation >= 5 else (11, 17, 3))
    assert image.notes == (() if orientation == 1 else (ROTATED,))
    assert image.content == content


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_orientation_is_refused_where_masks_exist(orientation: int) -> None:
    with pytest.raises(ValueError, match=f"EXIF orientation {orientation}: its masks and boxes may be of"):
        decode_photograph(oriented(orientation, "JPEG"), rotate=False)


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_no_orientation_is_needed_or_known(orientation: int) -> None:
    image = decode_photograph(oriented(orientation, "PNG"), rotate=False)
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert image.notes == ()


@pytest.mark.parametrize(("kind", "end"), [("PNG", 12), ("JPEG", 2)])  # bytes of the mark of the end
def test_a_file_torn_before_its_end_is_an_error(kind: str, end: int) -> None:
    content = encode(Image.fromarray(PIXELS), kind)
    for length in (*range(0, len(content) - end, 7), len(content) - end - 1):
        with pytest.raises(ValueError, match=r"damaged image|neither a JPEG nor a PNG file"):
            decode_photograph(content[:length])


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"GIF89a", encode(Image.fromarray(PIXELS), "BMP")])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="neither a JPEG nor a PNG file"):
        decode_photograph(content)


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encode(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000  # 50 MB of pixels, 1.2 GB as RGB
    with pytest.raises(ValueError, match=r"damaged image: .*decompression bomb"):
        decode_photograph(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 20):  # Pillow warns of the first and refuses the second
        with pytest.raises(ValueError, match="decompression bomb"):
            decode_image(encode(Image.new("L", (side, side))))
