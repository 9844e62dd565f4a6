"""The processes below one, and what they have of memory, from /proc."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All processes below one; those that end meanwhile are left out."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            stat = read(int(entry), "stat")
            if stat:
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found += new
    return found


def memory_mib(pid: int, file: str, field: str) -> float:
    """A field of a file of /proc, such as RssAnon of status or Pss of smaps_rollup; 0 if the process has ended."""
    lines = [line for line in read(pid, file).splitlines() if line.startswith(f"{field}:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def name_of(pid: int) -> str:
    """The command line, which Ray sets to what a worker does."""
    return read(pid, "cmdline").replace("\0", " ")


def read(pid: int, file: str) -> str:
    """A file of /proc, empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""
