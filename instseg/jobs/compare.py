"""Results side by side: is one better than another? Answers with paired-bootstrap intervals, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from instseg.config import CompareConfig
from instseg.data.voc import BACKGROUND_NAME, VOC_CLASSES
from instseg.evaluation.significance import Comparison
from instseg.evaluation.significance import compare as compare_records
from instseg.jobs.ending import command, end
from instseg.jobs.results import find_results
from instseg.jobs.roots import check_out
from instseg.report.comparison import (
    Result,
    Table,
    comparison_record,
    largest,
    legend,
    letters,
    metric_table,
    paper_table,
    setting_table,
    shorter,
    verdict,
)
from instseg.report.comparison_panel import save_comparison_panel
from instseg.report.page import Section, claim, picture, save_page, table
from instseg.report.tables import align, write_json
from instseg.storage import StoragePath


def compare(config: CompareConfig) -> dict[str, Comparison]:
    """Print whether each result is better than the first; write comparison.json, .html and a picture of each pair.

    Returns:
        What the bootstrap found, second minus first, by the name of the second.

    Raises:
        FileNotFoundError: If there is no such folder and no such MLflow run, or one without results.
        ValueError: If there are fewer than two results, or they are not of the same data and images, or damaged.
        JobError: If MLflow cannot be reached.
    """
    out = check_out(config.out)
    results = find_results(config.results, config.tracking)
    if len(results) < 2:
        raise ValueError(f"results: expected two or more, got {results[0].name} alone; name what to compare it with")
    first, *others = results
    _check_data(results, config.across_data)
    comparisons = [_compare(first, other, config.num_resamples) for other in others]
    verdicts = [verdict(first, other, found) for other, found in zip(others, comparisons, strict=True)]
    print("\n".join(verdicts), flush=True)
    tables = _tables(results, comparisons)
    print("\n\n".join(["", *("\n".join(align(shorter(table))) for table in tables.values())]), flush=True)
    record = comparison_record(results, comparisons)
    write_json(out / "comparison.json", record)
    sections = [Section("answer", "Is it better?", list(map(claim, verdicts)))]
    sections += [Section(f"part-{k}", title, [table(rows)]) for k, (title, rows) in enumerate(tables.items())]
    sections += _pictures(config, results, record["changes"], out)
    facts = {"images": str(len(first.records)), "data": str(first.content.get("data_digest"))[:12]}
    save_page(out / "comparison.html", "Comparison", sections, facts | {"resamples": str(config.num_resamples)})
    end(out, ("comparison.html", "comparison.json"), [_next(results)])
    return {other.name: found for other, found in zip(others, comparisons, strict=True)}


def _next(results: Sequence[Result]) -> str:
    """What limits the best; after a cross-validation, its training on all images."""
    best = max(results, key=lambda result: result.metrics["ap_r_vol"]).content["config"]
    if "checkpoint" not in best:
        return command("train", data=best["data"], out="FOLDER")
    return command("evaluate", "--diagnose", data=best["data"], checkpoint=best["checkpoint"], out="FOLDER")


def _check_data(results: Sequence[Result], across_data: bool) -> None:
    first = results[0]
    for other in results[1:]:
        if other.classes != first.classes:
            raise ValueError(f"{first.name} and {other.name}: expected the same classes, got different ones")
        digests = [str(result.content.get("data_digest")) for result in (first, other)]
        if digests[0] != digests[1] and not across_data:
            raise ValueError(
                f"{first.name} and {other.name}: expected results on the same data, got those of {digests[0][:12]} and "
                f"{digests[1][:12]}; --across-data compares them nevertheless if their images and truth are the same"
            )


def _compare(first: Result, other: Result, num_resamples: int) -> Comparison:
    try:
        return compare_records(first.records, other.records, num_resamples)
    except ValueError as error:
        raise ValueError(f"{first.name} (first) and {other.name} (second): {error}") from error


def _tables(results: Sequence[Result], comparisons: Sequence[Comparison]) -> Mapping[str, Table]:
    tables = {
        "Results": legend(results),
        "Scores, and differences with 95 % intervals": metric_table(results, comparisons),
        "Settings that differ": setting_table(results),
    }
    if results[0].classes == (BACKGROUND_NAME, *VOC_CLASSES):
        tables["For reference"] = paper_table()
    return tables


def _pictures(
    config: CompareConfig,
    results: Sequence[Result],
    changes: Mapping[str, Mapping[str, tuple[float, float]]],
    out: StoragePath,
) -> list[Section]:
    """Draw, for each pair, the images that changed most, of all `changes` by name; what cannot be drawn is said."""
    from instseg.jobs.redraw import redraw  # imports torch and Ray, for which the verdicts do not wait

    first, *others = results
    sections = []
    for letter, other in zip(letters(results)[1:], others, strict=True):
        found = changes[other.name]
        images = largest(found, config.num_figures)
        pairs = redraw(first, other, {image: found[image] for image in images})
        if pairs:
            place, title = out / f"images_{letter}.png", f"The largest changes from {first.name} to {other.name}"
            save_comparison_panel(place, pairs, (first.name, other.name), first.classes)
            sections.append(Section(f"changes-{letter}", title, [picture(place.read_bytes(), title)]))
    return sections
