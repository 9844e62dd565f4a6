"""Array types that name their shape, as in Float[Tensor, "N L"]: tests check them (pyproject.toml), users need none.

Annotations are not evaluated, so that the names do where jaxtyping, which only the tests load, is missing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Integer, Num
else:
    Bool = Float = Int = Integer = Num = None

__all__ = ["Bool", "Float", "Int", "Integer", "Num"]
