"""Random views of a sample, mirrored, scaled and cropped: what is known of the image moves with its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as move

from instseg.config import AugmentConfig
from instseg.structures import VOID, Detections, Sample

_Move = Callable[[Tensor], Tensor]  # of a `tv_tensors` image, mask or boxes


def augment(sample: Sample, config: AugmentConfig, seed: int) -> Sample:
    """One random view of a sample: flipped, then scaled, then cropped.

    Args:
        sample: Any sample; it is not changed.
        config: What may be done to it.
        seed: 0 or more. The view depends on the arguments alone, and what one option draws not on the others.

    Returns:
        The sample in the pixels of the view. Detections whose box has no area there are gone; one whose foreground has
        no pixel there stays, with an empty foreground. Instances without a pixel are gone, the others renumbered.
    """
    mirror, zoom, down, across = np.random.default_rng(seed).random(4)
    if config.flip and mirror < 0.5:
        sample = flip(sample)
    low, high = config.scale
    sample = scale(sample, low * (high / low) ** zoom)
    rows, columns = (
        _window(side, config.crop or side, place)
        for side, place in zip(sample.image.shape[:2], (down, across), strict=True)
    )
    return crop(sample, rows, columns)


def flip(sample: Sample) -> Sample:
    """The mirror image, left to right."""
    logits = None if sample.logits is None else np.ascontiguousarray(sample.logits[:, :, ::-1])
    return _moved(sample, move.horizontal_flip, logits)


def scale(sample: Sample, factor: float) -> Sample:
    """The sample at `factor` times its size, to the nearest pixel and at least one.

    The image is averaged, masks are sampled at the nearest pixel. Logits stay as they are: wherever they are used they
    are upsampled to the image's size, whatever that is.
    """
    size = [max(1, round(factor * side)) for side in sample.image.shape[:2]]
    if size == list(sample.image.shape[:2]):
        return sample

    def resize(planes: Tensor) -> Tensor:
        is_mask = isinstance(planes, tv_tensors.Mask)
        return move.resize(planes, size, InterpolationMode.NEAREST_EXACT if is_mask else InterpolationMode.BILINEAR)

    return _renumbered(_moved(sample, resize, sample.logits))


def crop(sample: Sample, rows: slice, columns: slice) -> Sample:
    """A window of the sample.

    Args:
        sample: An image of H x W pixels and what is known of it.
        rows: Within 0..H, with a start and a stop.
        columns: Within 0..W, likewise.

    Returns:
        The window. Its logits are those at the image's size, cut out and rounded to their dtype (float16: a relative
        5e-4); a window that is the whole image keeps them as they are.
    """
    height, width = sample.image.shape[:2]
    window = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    if window == (0, 0, height, width):
        return sample
    logits = sample.logits
    if logits is not None:  # no coarse map of the window alone is upsampled to the same values
        coarse = torch.from_numpy(logits)[None].float()
        fine = interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
        logits = fine[:, rows, columns].numpy().astype(logits.dtype)
    return _renumbered(_moved(sample, lambda planes: move.crop(planes, *window), logits))


def _window(side: int, most: int, place: float) -> slice:
    """At most `most` of `side` pixels, all positions equally likely for a uniform `place` in [0, 1)."""
    size = min(most, side)
    start = int(place * (side - size + 1))
    return slice(start, start + size)


def _moved(sample: Sample, transform: _Move, logits: np.ndarray | None) -> Sample:
    image = transform(tv_tensors.Image(torch.from_numpy(sample.image).permute(2, 0, 1)))
    return replace(
        sample,
        image=_array(image.permute(1, 2, 0)),
        detections=_moved_detections(sample.detections, transform, sample.image.shape[:2]),
        semantic=_moved_mask(sample.semantic, transform),
        instances=_moved_mask(sample.instances, transform),
        logits=logits,
    )


def _moved_detections(detections: Detections, transform: _Move, size: tuple[int, int]) -> Detections:
    """Inside the new image; those without an area there are left out."""
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(detections.boxes), format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue]
    moved = _array(move.clamp_bounding_boxes(transform(boxes)))  # a rounding error may have left the image
    kept = (moved[:, :2] < moved[:, 2:]).all(1)
    foregrounds = _moved_mask(detections.foregrounds, transform)
    return Detections(
        detections.labels[kept],
        detections.scores[kept],
        moved[kept],
        None if foregrounds is None else foregrounds[kept],
    )


def _moved_mask(mask: np.ndarray | None, transform: _Move) -> np.ndarray | None:
    return None if mask is None else _array(transform(tv_tensors.Mask(torch.from_numpy(mask))))


def _renumbered(sample: Sample) -> Sample:
    """The sample with its instances as 1..G, in the same order, each with a pixel."""
    if sample.instances is None:
        return sample
    ids = np.unique(sample.instances[sample.instances > 0])
    names = np.zeros(ids.max(initial=0) + 2, sample.instances.dtype)
    names[ids], names[-1] = np.arange(1, len(ids) + 1), VOID  # void pixels, -1, read the last entry
    return replace(sample, instances=names[sample.instances], instance_labels=sample.instance_labels[ids - 1])


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy())
