"""What a COCO-format JSON says, entry by entry: what is wrong with one concerns its image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from instseg.data.network_outputs import parse_json
from instseg.data.quarantine import CorruptItemError, QuarantineRow, blame
from instseg.data.source import is_plain
from instseg.storage import StoragePath

Record: TypeAlias = dict[str, Any]


def read_index(path: StoragePath) -> dict[str, list[Any]]:
    """The JSON's lists `images`, `annotations`, `categories`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or lacks one of the lists.
    """
    try:
        content = parse_json(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"annotations {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"annotations {path}: not a JSON file: {error}") from None
    except RecursionError:
        raise ValueError(f"annotations {path}: expected COCO instances, got JSON that is nested too deeply") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"annotations {path}: expected an object with a list {name!r}, as COCO instances have")
    return content


def category_names(path: StoragePath, entries: list[Any]) -> dict[int, str]:
    """The name of each category id. Raises ValueError if one has none, or an id repeats."""
    names = {}
    for entry in entries:
        fields = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(fields[0]) is not int or not isinstance(fields[1], str) or not fields[1] or fields[0] in names:
            raise ValueError(f"annotations {path}: categories: expected an id, each once, and a name, got {entry!r}")
        names[fields[0]] = fields[1]
    return names


def collect_images(entries: list[Any], file: str) -> tuple[dict[str, Record], set[str], list[QuarantineRow]]:
    """A record of each image by its id, without annotations; the ids of all, and a row for each that is bad."""
    records: dict[str, Record] = {}
    known, rows = set[str](), []
    for position, entry in enumerate(entries):
        image_id = _image_id(entry, "id")
        try:
            with blame(image_id, f"{file}[images {position}]"):
                record = _check_image(entry, image_id)
                if image_id in known:
                    raise ValueError("image id is there before")
                records[image_id] = record
        except CorruptItemError as error:
            rows.append(error.row)
        known.add(image_id)
    return records, known - {""}, rows


def add_annotations(
    entries: list[Any], records: dict[str, Record], known: set[str], categories: Mapping[int, int], file: str
) -> list[QuarantineRow]:
    """Put the annotations of the classes into their images' records, by id ascending; their masks are not looked at.

    Args:
        entries: Of the JSON.
        records: As `collect_images` returns them; those of images with a bad annotation are taken away.
        known: The ids of all images.
        categories: The label of each category id; annotations of label 0 are left out.
        file: The JSON's name, for messages.

    Returns:
        A row for each bad annotation.
    """
    ids, rows = set[int](), []
    for position, entry in enumerate(entries):
        image_id = _image_id(entry, "image_id")
        try:
            with blame(image_id, f"{file}[annotations {position}]"):
                if image_id not in known:
                    raise ValueError("annotation of an unknown image")
                annotation = _check_annotation(entry, ids, categories)
        except CorruptItemError as error:
            rows.append(error.row)
            records.pop(image_id, None)
            continue
        ids.add(annotation["id"])
        if image_id in records and categories[annotation["category_id"]]:
            records[image_id]["annotations"].append(annotation)
    for record in records.values():
        record["annotations"].sort(key=lambda annotation: annotation["id"])
    return rows


def _check_annotation(entry: Any, ids: set[int], categories: Mapping[int, int]) -> Record:
    annotation = {name: entry.get(name) for name in ("id", "category_id", "segmentation")}
    if type(annotation["id"]) is not int:
        raise ValueError(f"annotation id: expected an integer, got {annotation['id']!r}")
    if annotation["id"] in ids:
        raise ValueError(f"annotation id is there before: {annotation['id']}")
    if type(annotation["category_id"]) is not int or annotation["category_id"] not in categories:
        raise ValueError(f"annotation of an unknown category: {annotation['category_id']!r}")
    if (is_crowd := entry.get("iscrowd", 0)) not in (0, 1):
        raise ValueError(f"iscrowd: expected 0 or 1, got {is_crowd!r}")
    return annotation | {"iscrowd": int(is_crowd)}


def _image_id(entry: object, field: str) -> str:
    """An image's id as text; "" where there is none."""
    value = entry.get(field) if isinstance(entry, dict) else None
    return str(value) if isinstance(value, str) or type(value) is int else ""


def _check_image(entry: Any, image_id: str) -> Record:
    if not is_plain(image_id):
        raise ValueError("id is not a plain file name")
    name, height, width = (entry.get(field) for field in ("file_name", "height", "width"))
    if not isinstance(name, str) or not name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"file_name is not a path inside the folder of images: {name!r}")
    if not all(type(value) is int and value > 0 for value in (height, width)):
        raise ValueError(f"height and width: expected integers above 0, got {height!r}, {width!r}")
    return {"file_name": name, "height": height, "width": width, "annotations": []}
