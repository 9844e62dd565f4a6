"""Image files as users have them: JPEG or PNG, which is all that is decoded here, and RGB pixels of them."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

_PNG, _BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # how a PNG begins, and where its header has the bits of a channel
_UPRIGHT = 1  # EXIF orientation
ROTATED = "rotated as its EXIF orientation says"


class ImageFile(NamedTuple):
    """An image as its row has it.

    Attributes:
        content: The original JPEG or PNG bytes.
        pixels: (H, W, 3) uint8 RGB, upright.
        notes: What had to be done to get these pixels, such as `ROTATED`.
    """

    content: bytes
    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def decode_image(content: bytes) -> Image.Image:
    """Decode JPEG or PNG bytes, nothing else, in the file's own mode.

    Raises:
        ValueError: If the content is damaged, of another format, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(content), formats=("JPEG", "PNG")).verify()  # a PNG's checksums, which load() skips
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
            image.load()
            return image
    except Image.UnidentifiedImageError:
        raise ValueError("neither a JPEG nor a PNG file") from None
    except (OSError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"damaged image: {error}") from None


def decode_photograph(content: bytes, rotate: bool = True) -> ImageFile:
    """The upright RGB pixels of a JPEG or PNG with 8 bits a channel.

    Args:
        content: The file.
        rotate: Whether it may be turned as its EXIF orientation says; not where masks or boxes of it exist, of which
            nobody knows whether they are of the file's pixels or of the upright ones.

    Raises:
        ValueError: As `decode_image`; or if it has 16 bits a channel, or is to be turned and may not.
    """
    image = decode_image(content)
    deep = content.startswith(_PNG) and content[_BIT_DEPTH] == 16  # Pillow drops half of the bits of some, silently
    if deep or image.mode.startswith(("I", "F")):
        raise ValueError("expected 8 bits a channel, got more; convert the image")
    notes = [] if image.mode == "RGB" else [f"converted to RGB from mode {image.mode}"]
    orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    if orientation in range(_UPRIGHT + 1, 9):
        if not rotate:
            raise ValueError(
                f"EXIF orientation {orientation}: its masks and boxes may be of the file's pixels or of the upright "
                "image; rotate the file's pixels, or remove the tag"
            )
        image = ImageOps.exif_transpose(image)
        notes.append(ROTATED)
    return ImageFile(content, np.array(image.convert("RGB")), tuple(notes))
