"""The folder that a run writes to."""

from __future__ import annotations

from pathlib import Path


def check_folder(out: Path) -> None:
    """Raise ValueError if `out`, or what it lies under, is something else than a folder."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"out {out}: expected a folder or a new name, but {nearest} is a file; choose another --out")
