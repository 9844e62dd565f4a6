"""The same images as several checkpoints segment them, side by side, so that one sees the segmentation sharpen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instseg.report.colours import PALETTE, choose_colours, like_truth
from instseg.report.pictures import COLUMN_INCHES, blend, save_figure, show, write
from instseg.storage import Place
from instseg.structures import InstanceMap, Sample


def save_progress(
    place: Place, samples: Sequence[Sample], checkpoints: Mapping[str, Sequence[InstanceMap]], classes: Sequence[str]
) -> None:
    """Draw one row for each image: the photograph, its instances after each checkpoint, the ground truth.

    An instance has the colour of the true instance that it covers most of, in every column.

    Args:
        place: PNG to write.
        samples: At least one image, with ground truth.
        checkpoints: By title, such as "step 500", in their order, the instance map of each sample.
        classes: Class names, [0] is "background".

    Raises:
        ValueError: If a sample has no ground truth.
    """
    ratios = [sample.image.shape[0] / sample.image.shape[1] for sample in samples]
    titles = ["Photograph", *checkpoints, "Ground truth"]
    size = COLUMN_INCHES * len(titles), COLUMN_INCHES * sum(ratios) + 0.25
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # pyright: ignore
    cells = figure.subplots(len(samples), len(titles), squeeze=False, height_ratios=ratios)
    for index, (row, sample) in enumerate(zip(cells, samples, strict=True)):
        _draw_row(row, sample, [maps[index] for maps in checkpoints.values()], classes)
    for axes, title in zip(cells[0], titles, strict=True):
        axes.set_title(title, fontsize=10, pad=4, parse_math=False)
    save_figure(figure, place)


def _draw_row(row: Sequence[Axes], sample: Sample, predicted: Sequence[InstanceMap], classes: Sequence[str]) -> None:
    truth = sample.known_instances
    if truth is None:
        raise ValueError(f"{sample.image_id}: expected a sample with ground truth, got one without")
    colours_of_truth = choose_colours(truth, len(sample.instance_labels))
    show(row[0], sample.image / 255)
    show(row[-1], blend(sample.image, truth, PALETTE[colours_of_truth]))
    for axes, instance_map in zip(row[1:-1], predicted, strict=True):
        wanted = like_truth(instance_map, truth, colours_of_truth)
        colours = PALETTE[choose_colours(instance_map.instances, len(instance_map), wanted)]
        show(axes, blend(sample.image, instance_map.instances, colours))
        for instance, label in enumerate(map(int, instance_map.labels), 1):
            write(axes, instance_map.instances == instance, classes[label])
