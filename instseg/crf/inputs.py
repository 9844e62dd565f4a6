"""What a caller's images and unaries become: tensors on the CRF's device, or an error that names the argument."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instseg.checks import array, require
from instseg.shapes import Num

_IMAGE = "numbers (H, W, 3), RGB 0..255"


def image_tensors(images: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Images (H, W, 3), RGB 0..255, on `device`: of tensors, NumPy arrays, or what NumPy reads as such.

    Raises:
        ValueError: If one has another shape, no numbers, or integers outside 0..255.
    """
    tensors = [_image_tensor(image) for image in images]
    if any(tensor.is_floating_point() and tensor.min() >= 0 and 0 < tensor.max() <= 1 for tensor in tensors):
        warnings.warn("image: values in 0..1, expected 0..255; multiply by 255", UserWarning, stacklevel=4)
    return [tensor.to(device) for tensor in tensors]


def unary_tensor(unary: Any, device: torch.device) -> Tensor:
    """A unary (L, H, W) on `device`; a tensor must lie there, for its gradient's sake.

    Raises:
        ValueError: If it has no numbers, or is a tensor on another device.
    """
    if isinstance(unary, Tensor):
        require(unary.device == device, "unary", f"a tensor on {device}, where the CRF is", f"one on {unary.device}")
    return _numbers("unary", unary, "numbers (L, H, W)").to(device)


def _image_tensor(image: Any) -> Num[Tensor, "H W 3"]:
    tensor = _numbers("image", image, _IMAGE)
    shape_ok = tensor.ndim == 3 and tensor.shape[2] == 3 and 0 not in tensor.shape
    require(shape_ok, "image", "shape (H, W, 3) with H, W >= 1", tuple(tensor.shape))
    if tensor.dtype == torch.int64:
        low, high = (int(bound) for bound in torch.aminmax(tensor))
        require(low >= 0 and high <= 255, "image", "values in 0..255", f"{low}..{high}; divide 16 bits by 257")
    return tensor


def _numbers(name: str, value: Any, expected: str) -> Tensor:
    """A tensor of uint8, int64 or floating-point numbers: for other integers torch has few operations."""
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(array(name, value, expected))
    real = tensor.dtype != torch.bool and not tensor.is_complex()
    require(real, name, expected, f"dtype {tensor.dtype}")
    return tensor if tensor.is_floating_point() or tensor.dtype == torch.uint8 else tensor.long()
