"""Against SciPy's reader where that is safe, and files that ask for more memory than there is."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from instseg.data.matlab import MAX_INFLATED, read_struct

HEADER = b"MATLAB 5.0".ljust(124) + b"\x00\x01IM"


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<2I", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(class_: int, dims: tuple[int, ...], *parts: bytes, name: str = "GT") -> bytes:
    head = element(6, struct.pack("<2I", class_, 0)) + element(5, struct.pack(f"<{len(dims)}i", *dims))
    return element(14, head + element(1, name.encode()) + b"".join(parts))


def structure(*fields: bytes, names: tuple[str, ...] = ("Map",), width: int = 32) -> bytes:
    padded = b"".join(name.encode().ljust(width, b"\0") for name in names)
    return matrix(2, (1, 1), element(5, struct.pack("<i", width)),
                  element(1, padded), *fields)  # fmt: skip


def bomb() -> bytes:
    """Four megabytes, of which a variable of four gigabytes comes."""
    packer = zlib.compressobj()
    start = packer.compress(struct.pack("<2I", 14, 0xFFFFFF00)) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    content = start + zeros * 256
    return HEADER + struct.pack("<2I", 15, len(content)) + content


def save(value: Any, compress: bool = False) -> bytes:
    file = io.BytesIO()
    savemat(file, {"before": np.arange(3), "GT": value}, do_compression=compress)
    return file.getvalue()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_arrays_are_those_that_scipy_reads(dtype: str, compress: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 100, shape).astype(dtype) for shape in [(5, 7), (1, 1), (3, 0), (2, 3, 4)]]
    names = [f"field{k}" for k in range(len(arrays))]
    content = save(dict(zip(names, arrays, strict=True)) | {"other": "text"}, compress)
    theirs = loadmat(io.BytesIO(content))["GT"]
    for name, array, ours in zip(names, arrays, read_struct(content, "GT", *names), strict=True):
        np.testing.assert_array_equal(ours, array)
        np.testing.assert_array_equal(ours, theirs[name].item())
        assert ours.dtype == theirs[name].item().dtype


def test_the_other_byte_order() -> None:
    """A file that SciPy reads too, for it writes none."""

    def swap(kind: int, content: bytes) -> bytes:
        return struct.pack(">2I", kind, len(content)) + content + bytes(-len(content) % 8)

    def head(class_: int, rows: int, columns: int, name: bytes) -> bytes:
        shape = struct.pack(">2i", rows, columns)
        return swap(6, struct.pack(">2I", class_, 0)) + swap(5, shape) + swap(1, name)

    field = swap(14, head(6, 1, 2, b"") + swap(4, struct.pack(">2H", 3, 500)))
    names = struct.pack(">2Hi", 4, 5, 8) + swap(1, b"Map".ljust(8, b"\0"))  # a short element is swapped as one word
    content = HEADER[:-4] + b"\x01\x00MI" + swap(14, head(2, 1, 1, b"GT") + names + field)
    assert loadmat(io.BytesIO(content))["GT"]["Map"].item().tolist() == [[3, 500]]
    assert read_struct(content, "GT", "Map")[0].tolist() == [[3, 500]]


SCALAR = matrix(6, (1, 1), element(2, b"\7"), name="")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bomb(), "^decompression bomb: more than 16 MiB once inflated$"),
        (HEADER + matrix(4, (1 << 15, 1 << 15), element(16, b"")), "^no struct GT in it$"),
        (HEADER + matrix(2, (1 << 15, 1 << 15), element(5, bytes(4)), element(1, b"")), "^no struct GT in it$"),
        (HEADER + structure(matrix(4, (1 << 15, 1 << 15), element(16, b""))), "expected an array of real numbers"),
        (HEADER + structure(matrix(1, (1 << 15, 1 << 15))), "expected an array of real numbers, got MATLAB's class 1"),
        (HEADER + structure(matrix(6, (1 << 15, 1 << 15), element(9, b""))), "damaged: 0 bytes of type 9"),
        (HEADER + structure(matrix(6, (-1, 1), element(9, bytes(8)))), "damaged: 8 bytes of type 9"),
        (HEADER + structure(*[SCALAR] * 4000, names=("x",) * 4000, width=1), "damaged names of fields"),
        (HEADER + structure(SCALAR, width=0), "damaged names of fields"),
        (HEADER + structure(SCALAR)[:-3], "damaged: it ends inside an element"),
        (HEADER + structure(matrix(6, ())[:8]), "damaged: it ends inside an element"),
        (HEADER + structure(element(14, element(6, b""))), "damaged: an array ends early"),
        (HEADER[:-4] + b"\x00\x02IM" + structure(SCALAR), "not a MATLAB 5 file"),
        (save({"Map": np.arange(3)}, compress=True)[:-9], "damaged: it ends inside"),
        (save({"Map": np.array([1j])}), "expected an array of real numbers"),
        (save({"Map": np.array([{"a": 1}, {"a": 2}])}), "expected an array of real numbers"),
        (save({"Other": 1}), "^no field GT.Map; got Other$"),
    ],
)  # fmt: skip
def test_a_hostile_or_damaged_file_costs_no_memory(content: bytes, reason: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            read_struct(content, "GT", "Map")
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_INFLATED
    finally:
        tracemalloc.stop()


def test_the_hand_made_files_can_be_read() -> None:
    """So that what is wrong with them is what was meant."""
    assert read_struct(HEADER + structure(SCALAR), "GT", "Map")[0].tolist() == [[7]]
