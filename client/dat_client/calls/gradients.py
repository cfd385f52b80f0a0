"""Converts gradients to the datatype in which they are sent, scaled so that small values do not become 0."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from dat_client.calls.arrays import to_numpy
from dat_client.calls.checks import choice
from dat_client.errors import invalid
from dat_client.wire.scan import largest_magnitudes
from dat_client.wire.vocabulary import GRADIENT_DTYPES


def gradient_tensors(
    gradients: Any, shape: tuple[int, ...] | None, dtype: str = "FP16"
) -> dict[str, npt.NDArray[Any]]:
    """Returns the request's input `gradients` and, for FP16 and INT8, its input `gradient_scales` float32 [N].

    The gradient of sample n is gradient_scales[n] · gradients[n]. FP16: the scale is the power of two that brings
    the sample's largest magnitude just below 2^15 (or the nearest such power in fp32), so that values down to 2^-38
    of the largest do not become 0. INT8: the scale is the sample's largest magnitude / 127, and quotients are
    rounded to the nearest integer. bfloat16 tensors are converted to float32 first.

    `shape` is that of the images, or None for encoded pictures. Raises InvalidRequest if the gradients have a dtype
    other than float16, float32 or (torch) bfloat16, do not have the images' shape, or are not finite.
    """
    torch: Any = sys.modules.get("torch")
    on_torch = torch is not None and isinstance(gradients, torch.Tensor)
    if on_torch:  # scale on the tensor's device: that is fast on a GPU and halves the bytes to copy from it
        array = gradients.detach()
        array = array.float() if array.dtype == torch.bfloat16 else array
    else:
        array, _ = to_numpy(gradients, "gradients")
    limit = f"float16 or float32 of shape {list(shape) if shape else '[N,3,H,W]'}"
    dtype_name = str(array.dtype).removeprefix("torch.")
    if dtype_name not in ("float16", "float32"):
        raise invalid("gradients", limit, found=f"dtype {dtype_name}")
    if array.ndim != 4 or array.shape[1] != 3 or 0 in array.shape or (shape and tuple(array.shape) != shape):
        raise invalid("gradients", limit, found=f"shape {list(array.shape)}")
    choice("gradient_dtype", dtype, GRADIENT_DTYPES)
    if on_torch:
        low, high = array.reshape(len(array), -1).aminmax(dim=1)
        largest = np.maximum(high.cpu().numpy(), -low.cpu().numpy()).astype(np.float32)
    else:
        largest = largest_magnitudes(array).astype(np.float32)
    if not np.isfinite(largest).all():
        sample = int(np.argmin(np.isfinite(largest)))
        raise invalid("gradients", "finite numbers", found=f"NaN or infinity in sample {sample}")
    if dtype == "FP32":
        return {"gradients": array.float().cpu().numpy() if on_torch else array.astype(np.float32, copy=False)}
    if dtype == "INT8":
        scales = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny)  # never 0: it is a divisor
        return {"gradients": _scaled_down(array, scales, 127, np.int8), "gradient_scales": scales}
    exponents = np.maximum(np.frexp(largest)[1] - 15, -126)  # frexp(0) is 0; -126 keeps scales normal numbers
    scales = np.ldexp(np.float32(1), exponents).astype(np.float32)
    # The next fp16 above 32752 is 2^15, and 2^15 times the largest scale is infinite.
    return {"gradients": _scaled_down(array, scales, 32752, np.float16), "gradient_scales": scales}


def _scaled_down(array: Any, scales: npt.NDArray[np.float32], limit: int, dtype: type) -> npt.NDArray[Any]:
    """Divides each sample by its scale, clips it to ±limit and rounds it to `dtype` (int8 or float16)."""
    to_integers = dtype is np.int8
    if not isinstance(array, np.ndarray):
        torch: Any = sys.modules["torch"]
        values = array.float() / torch.from_numpy(scales).to(array.device)[:, None, None, None]
        values = values.clamp_(-limit, limit)
        rounded = values.round_().to(torch.int8) if to_integers else values.half()
        return rounded.cpu().numpy()  # type: ignore[no-any-return]
    quotients = array.astype(np.float32, copy=False) / scales[:, None, None, None]
    np.clip(quotients, -limit, limit, out=quotients)
    return (np.rint(quotients, out=quotients) if to_integers else quotients).astype(dtype)
