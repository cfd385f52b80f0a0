"""A trainer's pictures to what travels, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dat_client.errors import InvalidRequest, shown

# Of a grey level. k/255 in fp32 comes back within 2e-5; δ is 7e-2 (DESIGN.md, "Numerics").
ON_A_LEVEL = 1e-4


def checked(images: Any, what: str = "images") -> Tensor:
    """`images` itself if it is a tensor [N,3,H,W]; raises InvalidRequest."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        limit = "a torch tensor [N,3,H,W], uint8 or float in 0..1"
        raise InvalidRequest(f"{what}: must be {limit}, got {shown(found)}", field=what, value=found, limit=limit)
    return images


def check_reconstruction(reconstruction: Any, like: Tensor) -> Tensor:
    """Q(x) that the trainer has already, itself if it is uint8 or float in 0..1 and of the shape of x."""
    checked(reconstruction, "reconstruction")
    dtype, shape = reconstruction.dtype, list(reconstruction.shape)
    wrong = None
    if shape != list(like.shape):
        wrong = f"shape {shape}"
    elif dtype != torch.uint8 and not dtype.is_floating_point:
        wrong = f"dtype {dtype}"
    elif dtype != torch.uint8 and reconstruction.numel():
        low, high = (float(value) for value in reconstruction.aminmax())
        wrong = None if low >= 0 and high <= 1 else f"values from {low:g} to {high:g}"
    if wrong:
        limit = f"uint8 or float in 0..1 of shape {list(like.shape)}"
        message = f"reconstruction: {wrong}, must be {limit}"
        raise InvalidRequest(message, field="reconstruction", value=wrong, limit=limit)
    kept: Tensor = reconstruction
    return kept


def to_wire(images: Tensor) -> Tensor:
    """The same pictures as uint8 where each value is one of the 256 levels, else as they are (bfloat16 as fp32).

    Crops and flips leave k/255, a quarter of the bytes; interpolation and jitter of float pictures do not.
    """
    images = images.detach()
    if images.dtype == torch.bfloat16 or images.dtype == torch.float64:
        images = images.float()
    if images.dtype != torch.float32:
        return images
    levels = images * 255
    rounded = levels.round()
    exact = ((levels - rounded).abs_() <= ON_A_LEVEL).all() & (rounded >= 0).all() & (rounded <= 255).all()
    return rounded.to(torch.uint8) if bool(exact) else images


def float_dtype(images: Tensor) -> torch.dtype:
    """The dtype in which the trainer sees these pictures: their own float, fp32 for uint8."""
    return images.dtype if images.dtype.is_floating_point else torch.float32


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. To a CPU it waits: what is on its way there may be read before it has come."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def from_wire(arrived: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pictures (a tensor) as floats in 0..1 on `device`."""
    pictures: Tensor = moved(arrived, device)
    if pictures.dtype == torch.uint8:
        return pictures.to(torch.float32).div_(255).to(dtype)
    return pictures.to(dtype)
