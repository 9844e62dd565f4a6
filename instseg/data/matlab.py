"""Numbers in the struct of a MATLAB 5 file (MAT-File Level 5 of MathWorks' "MAT-File Format"), in bounded memory.

SciPy's reader allocates whatever a file says that its arrays hold, for which 200 bytes are enough.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

MAX_INFLATED = 1 << 24  # bytes of one variable; of the published SBD, whose images have 500 x 500 pixels, 2e6 at most

_HEADER = 128  # bytes; the last four are the version and the byte order
_VERSION = 0x0100
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # likewise
_STRUCT, _NUMERIC = 2, range(6, 16)  # classes of matrices
_COMPLEX = 0x0800  # flag of a matrix
_MAX_FIELDS = 1000  # of a struct; those of SBD have three


def read_struct(content: bytes, name: str, *fields: str) -> list[np.ndarray]:
    """Fields of a variable that is one struct; others are not looked at.

    Args:
        content: The file.
        name: Of the variable.
        fields: Names of fields that are arrays of real numbers.

    Returns:
        The arrays, of the types and the shapes that they are stored in.

    Raises:
        ValueError: If the file is damaged or of another format, has no such struct or field, a field holds something
            else, or a variable before it or itself is a decompression bomb, of more than `MAX_INFLATED` bytes.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[_HEADER - 2 : _HEADER])
    if order is None or struct.unpack_from(f"{order}H", content, _HEADER - 4) != (_VERSION,):
        raise ValueError("not a MATLAB 5 file")
    try:
        for matrix in _variables(memoryview(content)[_HEADER:], order):
            parts = _elements(matrix, order)
            if _header(parts, order) == (_STRUCT, (1, 1), name):
                return _select(name, parts, fields, order)
    except struct.error as error:
        raise ValueError(f"damaged: {error}") from None
    raise ValueError(f"no struct {name} in it")


def _select(
    name: str, parts: Iterator[tuple[int, memoryview]], fields: tuple[str, ...], order: str
) -> list[np.ndarray]:
    """Fields of a struct, of which `parts` are what follows its own name."""
    length, names = (_take(parts) for _ in range(2))
    (width,) = struct.unpack(f"{order}i", length)
    if not 0 < len(names) <= _MAX_FIELDS * width:
        raise ValueError(f"{name}: damaged names of fields")
    words = [bytes(names[at : at + width]).split(b"\0")[0].decode("latin1") for at in range(0, len(names), width)]
    there = dict(zip(words, parts, strict=False))
    for field in fields:
        if field not in there:
            raise ValueError(f"no field {name}.{field}; got {', '.join(there)}")
    return [_numbers(f"{name}.{field}", there[field][1], order) for field in fields]


def _numbers(name: str, matrix: memoryview, order: str) -> np.ndarray:
    if not matrix:
        return np.zeros((0, 0))  # how an empty array may be stored
    parts = _elements(matrix, order)
    kind, dims, _ = _header(parts, order)
    if kind not in _NUMERIC:
        raise ValueError(f"{name}: expected an array of real numbers, got MATLAB's class {kind & 0xFF}")
    stored, data = next(parts, (0, b""))
    if stored not in _NUMBERS or len(data) != math.prod(dims) * np.dtype(_NUMBERS[stored]).itemsize:
        raise ValueError(f"{name}: damaged: {len(data)} bytes of type {stored} for dimensions {dims}")
    return np.frombuffer(data, order + _NUMBERS[stored]).reshape(dims, order="F")


def _header(parts: Iterator[tuple[int, memoryview]], order: str) -> tuple[int, tuple[int, ...], str]:
    """The class of a matrix, above 255 if it is complex; its dimensions; its name."""
    flags, dims, name = (_take(parts) for _ in range(3))
    (word, _), shape = struct.unpack(f"{order}2I", flags), struct.unpack(f"{order}{len(dims) // 4}i", dims)
    return word & (0xFF | _COMPLEX), shape, bytes(name).decode("latin1")


def _variables(data: memoryview, order: str) -> Iterator[memoryview]:
    for kind, element in _elements(data, order):
        if kind == _COMPRESSED:
            kind, element = next(_elements(memoryview(_inflate(element)), order), (0, element))
        if kind == _MATRIX:
            yield element


def _inflate(data: memoryview) -> bytes:
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(data, MAX_INFLATED + 1)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from None
    if len(content) > MAX_INFLATED:
        raise ValueError(f"decompression bomb: more than {MAX_INFLATED >> 20} MiB once inflated")
    if not inflater.eof:
        raise ValueError("damaged: it ends inside compressed data")
    return content


def _take(parts: Iterator[tuple[int, memoryview]]) -> memoryview:
    for _, data in parts:
        return data
    raise ValueError("damaged: an array ends early")


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each element; all but compressed ones are padded to multiples of 8 bytes."""
    while data:
        if len(data) < 8:
            raise ValueError("damaged: it ends inside an element")
        kind, size = struct.unpack_from(f"{order}2I", data)
        start = 8
        if kind >> 16:  # at most 4 bytes, behind a tag of 4
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
        if start + size > len(data):
            raise ValueError("damaged: it ends inside an element")
        yield kind, data[start : start + size]
        data = data[start + size if kind == _COMPRESSED else start + size + -(start + size) % 8 :]
