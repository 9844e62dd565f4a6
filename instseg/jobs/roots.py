"""The roots of a run, checked before anything is computed."""

from __future__ import annotations

from instseg.jobs.cluster import cluster_nodes
from instseg.storage import Place, StoragePath, nearest_existing


def check_inputs(**places: Place | None) -> None:
    """Raise StorageError for the first of these options whose store cannot be reached or refuses to be read."""
    for place in places.values():
        if place is not None:
            StoragePath.of(place).check_reachable()


def check_out(out: Place, option: str = "out") -> StoragePath:
    """The root that a run writes to, which this option names.

    Raises:
        ValueError: If it, or what it lies under, is something else than a folder.
        OSError: If it cannot be written.
    """
    root = StoragePath.of(out)
    if root.local is not None:
        nearest = nearest_existing(root.local)
        if not nearest.is_dir():
            raise ValueError(
                f"{option} {out}: expected a folder or a new name, but {nearest} is a file; choose another --{option}"
            )
    root.check_writable()
    return root


def check_nodes(**places: StoragePath | None) -> None:
    """Raise ValueError if the running cluster has several nodes and one of these options is a path of this machine."""
    num_nodes = len(cluster_nodes())
    for option, place in places.items():
        if num_nodes > 1 and place is not None and not place.scheme:
            raise ValueError(
                f"{option} {place}: is a path of this machine, and the cluster has {num_nodes} nodes; use a URI that "
                f"every node reaches, such as s3://bucket/prefix, or file://{place} if all of them mount that folder"
            )
