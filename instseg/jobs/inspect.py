"""A look at a prepared data directory: the counts of all of it, and a contact sheet of some of its images."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from instseg.config import InspectConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import digest
from instseg.data.summary import DataSummary
from instseg.jobs.ending import command, end
from instseg.jobs.roots import check_inputs, check_out
from instseg.report.cells import Cell
from instseg.report.contact_page import save_contact_page
from instseg.report.contact_sheet import save_contact_sheet
from instseg.report.tables import align


def inspect(config: InspectConfig) -> DataSummary:
    """Print the counts of a data directory; write contact_sheet.png and contact_sheet.html to `config.out`.

    Raises:
        FileNotFoundError: If the data directory, or a part of it, is missing.
        ValueError: If it is damaged or has no images, or `out` cannot be a folder.
        OSError: If `out` cannot be written, or a store cannot be reached.
    """
    check_inputs(data=config.data)
    dataset, out = PreparedDataset(config.data), check_out(config.out)
    summary = DataSummary.of(dataset)
    tables = summary.tables()
    print("\n\n".join("\n".join(align(table)) for table in tables), flush=True)
    cells = [
        Cell.of(dataset[index], dataset.foreground_sources(index), dataset.classes)
        for index in choose(dataset.image_ids, config.num_samples, config.seed)
    ]
    save_contact_sheet(out / "contact_sheet.png", cells, dataset.classes)
    save_contact_page(out / "contact_sheet.html", str(dataset.root), cells, dataset.classes, tables)
    print(f"\ncontact sheet of {len(cells)} images")
    end(out, ("contact_sheet.png", "contact_sheet.html"), [command("train", data=dataset.root, out="FOLDER")])
    return summary


def choose(image_ids: Sequence[str], num: int, seed: int) -> list[int]:
    """Indices of `num` images, or of all if there are fewer, ascending; the ids and the seed alone decide which."""
    # Hashes, because NumPy's random streams may change from one version to the next.
    chosen = heapq.nsmallest(num, range(len(image_ids)), key=lambda index: digest([seed, image_ids[index]]))
    return sorted(chosen)
