"""Points in the lattice: the scale of the embedding, and keys of vertices (Adams, Baek, Davis 2010)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor


def check_features(features: Tensor) -> None:
    """Raise ValueError unless `features` are (N, C), N and C >= 1, and finite."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: expected shape (N, C) with N, C >= 1, got {tuple(features.shape)}")
    if not torch.isfinite(torch.stack(torch.aminmax(features))).all():  # both propagate NaN
        raise ValueError("features: expected finite values, got NaN or infinity; check the image and the thetas")


def deviations(num_features: int, dtype: torch.dtype) -> list[float]:
    """What each feature is multiplied by in the embedding, so that blurring once in each direction is unit variance.

    Rounded as the reference library does: at theta_beta = 3 ten iterations amplify one float32 rounding of a
    coordinate to 6e-4 in the marginals.
    """
    unit = torch.tensor((2.0 / 3.0) ** 0.5 * (num_features + 1), dtype=dtype).item()
    return [unit / (index * (index + 1)) ** 0.5 for index in range(1, num_features + 1)]


def key_layout(features: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) int64 lowest coordinates and strides with which a vertex's first C coordinates pack into one int64.

    Raises:
        ValueError: If the coordinates of the vertices need more than 62 bits.
    """
    num_features, margin = features.shape[1], 4 * (features.shape[1] + 1)
    scales = torch.tensor(deviations(num_features, torch.float64), dtype=torch.float64)
    bounds = _bounds(features).cpu().double() * scales
    # Coordinate j is the sum of the scaled features after the j-th, less j times the j-th.
    factors = torch.ones(num_features, num_features, dtype=torch.float64).triu()
    factors -= torch.diag(torch.arange(1.0, num_features, dtype=torch.float64), -1)
    extremes = factors * bounds[:, None]
    low = extremes.amin(0).sum(1).floor().long() - margin
    sizes = (extremes.amax(0).sum(1).ceil().long() + margin - low + 1).tolist()
    if prod(sizes) >= 2**62:
        raise ValueError(
            f"features: lattice coordinates span {sizes} cells, more than a 64-bit key holds; use larger thetas"
        )
    return low, torch.tensor([prod(sizes[:index]) for index in range(num_features)])


def _bounds(features: Tensor) -> Tensor:
    """(2, C): the lowest and the highest of `features` (N, C)."""
    # Torch reduces few long rows several times as fast as many short ones.
    factor = min(64, len(features))
    whole = len(features) - len(features) % factor
    long = features[:whole].reshape(-1, factor * features.shape[1])
    rest = torch.cat([long.amin(0), long.amax(0)]).reshape(-1, features.shape[1])
    return torch.stack(torch.aminmax(torch.cat([rest, features[whole:]]), dim=0))


def slices(lengths: Sequence[int]) -> Iterator[slice]:
    """Consecutive slices of these lengths."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length
