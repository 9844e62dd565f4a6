"""What arguments must be; errors name the argument, what was expected and what was got."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def choice(name: str, value: object, literal: Any) -> None:
    """Raise ValueError unless `value` is one of those of the `Literal` type, suggesting the nearest."""
    values = {str(choice): choice for choice in get_args(literal)}
    if value not in values.values():
        nearest = values[difflib.get_close_matches(str(value), values, n=1, cutoff=0)[0]]
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}; did you mean {nearest!r}?")


def finite(name: str, value: object) -> float:
    """A real number as a float, or ValueError; NaN and infinity are none."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def integer(name: str, value: object) -> int:
    """A whole number as an int, or ValueError."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    return int(value)


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` > 0."""
    require(value > 0, name, "a value > 0", value)


def non_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value` >= 0."""
    require(value >= 0, name, "a value >= 0", value)


def unit_interval(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= `value` <= 1."""
    require(0 <= value <= 1, name, "a value in [0, 1]", value)


def fields_as_declared(record: Any) -> None:
    """Check a dataclass's numbers and choices against their declared types; whole numbers become floats where asked.

    Raises:
        ValueError: If a number is none or not finite, or a choice is not among those of its `Literal`.
    """
    hints = get_type_hints(type(record))
    for field in fields(record):
        value, hint = getattr(record, field.name), hints[field.name]
        if isinstance(hint, UnionType) and type(None) in get_args(hint):  # others the record checks itself
            hint = None if value is None else get_args(hint)[0]
        if get_origin(hint) is Literal:
            choice(field.name, value, hint)
        elif hint is bool:
            require(isinstance(value, bool), field.name, "True or False", repr(value))
        elif hint in (int, float):
            # A weight given as 8 must become a floating-point parameter; records are frozen.
            object.__setattr__(record, field.name, (integer if hint is int else finite)(field.name, value))


def array(name: str, value: object, expected: str, dtype: type[np.generic] | None = None) -> np.ndarray:
    """What NumPy makes of `value`, as torch can read it: native byte order, no negative strides, writeable.

    Copied only where it must be; converted to `dtype`, if one is given.

    Raises:
        ValueError: If it is not an array of numbers or truth values, saying that `expected` was.
    """
    try:
        result = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU or with a gradient
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__} ({error})") from error
    if result.dtype.kind not in "buif":
        got = "None" if value is None else f"{type(value).__name__} of dtype {result.dtype}"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    if not result.flags.writeable or any(stride < 0 for stride in result.strides):
        result = result.copy()
    native = np.float64 if result.dtype.itemsize > 8 else result.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # becomes infinity, which callers refuse by name
        return result.astype(dtype or native, copy=False)
