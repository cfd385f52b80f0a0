"""Converts a trainer's images to the tensors that are sent, and answers to the trainer's device and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dat_client.errors import invalid

# A value within this distance of a grey level, measured in grey levels, counts as that level. k/255 computed in
# fp32 lies within 2e-5 of level k; the smallest step in use (α = 0.1, l2, 224x224) moves a pixel by 7e-2 levels.
LEVEL_TOLERANCE = 1e-4


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Lets the `with` block make tensors that can be trained on, also inside torch.inference_mode()."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def checked_images(images: Any, field: str = "images") -> Tensor:
    """Returns `images`; raises InvalidRequest, naming `field`, unless it is a dense tensor of 4 axes with data."""
    found = hint = None
    if not isinstance(images, Tensor):
        found = type(images).__name__
        hint = "convert it with torch.from_numpy" if found == "ndarray" else None
    elif images.ndim != 4:
        found = f"shape {list(images.shape)}"
    elif images.layout != torch.strided or images.is_meta or images.is_quantized:
        found = f"a tensor of layout {images.layout} on {images.device}, or quantized"
        hint = "make it an ordinary tensor with data (.to_dense(), .dequantize())"
    if found:
        raise invalid(field, "a torch tensor [N,3,H,W], uint8 or float in 0..1", found=found, hint=hint)
    checked: Tensor = images
    return checked


def is_empty(images: Tensor) -> bool:
    """Returns True for a batch of 0 images [0,3,H,W], about which nothing is requested."""
    return len(images) == 0 and images.shape[1] == 3


def checked_reconstruction(reconstruction: Any, images: Tensor) -> Tensor:
    """Returns `reconstruction`, a Q(x) that the trainer already has.

    Raises InvalidRequest unless it is uint8 or float in 0..1 and has the shape of `images`.
    """
    checked_images(reconstruction, "reconstruction")
    found = None
    if reconstruction.shape != images.shape:
        found = f"shape {list(reconstruction.shape)}"
    elif reconstruction.dtype.is_floating_point and reconstruction.numel():
        low, high = (float(value) for value in reconstruction.aminmax())
        found = None if low >= 0 and high <= 1 else f"values from {low:g} to {high:g}"
    elif not reconstruction.dtype.is_floating_point and reconstruction.dtype != torch.uint8:
        found = f"dtype {reconstruction.dtype}"
    if found:
        raise invalid("reconstruction", f"uint8 or float in 0..1 of shape {list(images.shape)}", found=found)
    checked: Tensor = reconstruction
    return checked


def to_wire(images: Tensor) -> Tensor:
    """Returns fp32 images as uint8 if each value is one of the 256 levels k/255, else unchanged.

    uint8 has a quarter of the bytes. Crops and flips keep values at k/255; interpolation and colour jitter of float
    images do not. bfloat16 and fp64 images are converted to fp32 first; other dtypes are returned unchanged.
    """
    images = images.detach()
    if images.dtype == torch.bfloat16 or images.dtype == torch.float64:
        images = images.float()
    if images.dtype != torch.float32:
        return images
    levels = images * 255
    rounded = levels.round()
    exact = ((levels - rounded).abs_() <= LEVEL_TOLERANCE).all() & (rounded >= 0).all() & (rounded <= 255).all()
    return rounded.to(torch.uint8) if bool(exact) else images


def float_dtype(images: Tensor) -> torch.dtype:
    """Returns the dtype of results for these images: their own dtype if it is a float one, else fp32."""
    return images.dtype if images.dtype.is_floating_point else torch.float32


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`. A copy to the CPU blocks: a program could read it before it is complete.

    A tensor that was made inside torch.inference_mode() is copied to one that can be trained on.
    """
    moved = tensor.to(device, non_blocking=device.type != "cpu")
    return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved


def from_wire(images: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns images, a uint8 or float tensor, as floats in 0..1 of `dtype` on `device`."""
    on_device: Tensor = to_device(images, device)
    if on_device.dtype == torch.uint8:
        return on_device.to(torch.float32).div_(255).to(dtype)
    return on_device.to(dtype)
