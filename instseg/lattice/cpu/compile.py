"""How loops are compiled, and where compiled ones are kept.

Numba looks for stale code at the file of a function alone, and keeps it in a folder named after that file's. Here the
folder is named after all that the code is made of: so an edit to a function that others call is seen by them too, and
copies of the same sources, as a cluster unpacks for each of its jobs, compile once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import llvmlite
import numba
from llvmlite import binding
from numba.core import caching
from numba.misc.appdirs import AppDirs

_HERE = Path(__file__).parent


def compiled(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """A loop as numba compiles it: it releases the interpreter's lock, and is kept on disk for other processes.

    In `cache_folder()`; where that cannot be read or written each process compiles for itself, and one is warned.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        loop: Any = numba.njit(nogil=True, parallel=parallel)(function)
        loop._cache = _Cache(function)  # what cache=True does, with numba's own cache
        return loop

    return compile_later


@lru_cache(1)
def cache_folder() -> Path:
    """In NUMBA_CACHE_DIR, else in the user's folder for caches; everything in it may be deleted at any time."""
    parent = Path(numba.config.CACHE_DIR or AppDirs("instseg", False).user_cache_dir)  # pyright: ignore
    features = sorted(binding.get_host_cpu_features().items())
    digest = sha256(repr([numba.__version__, llvmlite.__version__, binding.get_host_cpu_name(), features]).encode())
    for path in sorted([*_HERE.glob("*_loops.py"), _HERE / "simd.py", Path(__file__)]):
        digest.update(path.read_bytes())
    return parent / f"lattice-{digest.hexdigest()[:32]}"


@lru_cache(1)  # once, not for every loop
def _warn() -> None:
    warnings.warn(
        f"compiled loops cannot be kept in {cache_folder()}, so every process takes a minute to compile them again; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


class _Locator(caching._CacheLocator):
    """Says where the code of a function is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator:
        del py_file
        return cls(py_func)

    def get_cache_path(self) -> Any:
        return str(cache_folder())

    def get_source_stamp(self) -> Any:
        return cache_folder().name

    def get_disambiguator(self) -> Any:
        return str(self._line)


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes: ClassVar[list[Any]] = [_Locator]


class _Cache(caching.FunctionCache):
    """An index of its own for each signature: two processes that write different ones do not meet."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        self._open(sig)
        try:
            return super().load_overload(sig, target_context)
        except OSError:
            _warn()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        self._open(sig)
        try:
            super().save_overload(sig, data)
        except OSError:
            _warn()

    def _open(self, sig: Any) -> None:
        name = f"{self._impl.filename_base}-{sha256(str(sig).encode()).hexdigest()[:16]}"
        self._cache_file = caching.IndexDataCacheFile(self.cache_path, name, self._impl.locator.get_source_stamp())
