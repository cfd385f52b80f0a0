"""Converts what a trainer has (numpy arrays, torch tensors, encoded pictures) to tensors of the wire, and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dat_client.errors import invalid, shown
from dat_client.wire.scan import largest_magnitudes, range_outside_0_1
from dat_client.wire.vocabulary import GRADIENT_DTYPES

IMAGES_LIMIT = "uint8 0..255, or float16/float32 in 0..1, of shape [N,3,H,W]"

_MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # the beginnings of JPEG, PNG and WebP files


@dataclass(frozen=True)
class Kind:
    """The kind of the caller's arrays, and so of the answer's: numpy (`torch` is None), or torch on a device."""

    torch: Any = None
    device: Any = None

    def restore(self, array: npt.NDArray[Any]) -> Any:
        """Returns the array itself, or a tensor on the device; there uint16 becomes int64, so that it can index."""
        if self.torch is None:
            return array
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        if not (array.flags.aligned and array.flags.writeable):
            array = array.copy()
        return self.torch.from_numpy(array).to(self.device)


def to_numpy(value: Any, field: str) -> tuple[npt.NDArray[Any], Kind]:
    """Returns a numpy array or torch tensor as numpy, and its kind. Only a tensor on another device is copied.

    torch is looked up in sys.modules: a caller who passes a tensor has imported it, and the others need not pay for
    the import. Raises InvalidRequest for anything else.
    """
    if isinstance(value, np.ndarray):
        return value, Kind()
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        hint = "np.stack or torch.stack makes one array of a list" if isinstance(value, list | tuple) else None
        raise invalid(field, "a numpy array or a torch tensor", found=type(value).__name__, hint=hint)
    try:
        return value.detach().cpu().numpy(), Kind(torch, value.device)
    except TypeError:  # numpy lacks bfloat16 and some other dtypes
        hint = "use .half() or .float()"
        raise invalid(field, "of a dtype that numpy has", found=f"dtype {value.dtype}", hint=hint) from None


def images_tensor(images: Any) -> tuple[npt.NDArray[Any], Kind]:
    """Returns the `images` input of a request and the kind of its arrays, checked before any byte is sent.

    Args:
        images: uint8 [N,3,H,W] 0..255, or float16/float32 [N,3,H,W] in 0..1, numpy or torch; or a sequence
            of N encoded JPEG, PNG or WebP files as bytes.

    Raises:
        InvalidRequest: with the field, the offending value and the limit.
    """
    if isinstance(images, bytes | bytearray | memoryview):
        found = f"one encoded picture, {type(images).__name__}"
        raise invalid("images", "a sequence of pictures", found=found, hint="pass [picture]")
    if isinstance(images, np.ndarray) and images.dtype.kind == "O":
        images = images.reshape(-1).tolist()
    if isinstance(images, Sequence) and len(images) and isinstance(images[0], bytes | bytearray | memoryview):
        return _encoded_pictures(images), Kind()
    array, kind = to_numpy(images, "images")
    _check_images(array)
    return array, kind


def _encoded_pictures(pictures: Sequence[Any]) -> npt.NDArray[Any]:
    """Returns the BYTES tensor [N] of N encoded pictures."""
    tensor = np.empty(len(pictures), object)
    for index, picture in enumerate(pictures):
        is_bytes = isinstance(picture, bytes | bytearray | memoryview)
        tensor[index] = data = bytes(picture) if is_bytes else b""
        if not data.startswith(_MAGIC_BYTES):
            found = f"bytes that begin with {shown(data[:8])}" if is_bytes else type(picture).__name__
            raise invalid(f"images[{index}]", "an encoded JPEG, PNG or WebP file", found=found)
    return tensor


def _check_images(array: npt.NDArray[Any]) -> None:
    shape, dtype = list(array.shape), array.dtype
    found, hint = f"shape {shape}", None
    if (dtype.kind, dtype.itemsize) not in (("u", 1), ("f", 2), ("f", 4)):
        found = f"dtype {dtype}"
        if dtype == np.float64:
            hint = "float64 only doubles the bytes, use .astype(np.float32) or .float()"
    elif len(shape) == 3 and shape[0] == 3:
        hint = "this is a single image, pass images[None]"
    elif len(shape) == 4 and shape[3] == 3 and shape[1] != 3:
        hint = "these are channels last, transpose to [N,3,H,W]"
    elif len(shape) == 4 and shape[1] == 3 and 0 not in shape:
        outside = None if dtype == np.uint8 else range_outside_0_1(array)
        if outside is None:
            return
        found = f"values from {outside[0]:g} to {outside[1]:g}"
    raise invalid("images", IMAGES_LIMIT, found=found, hint=hint)


def indices_tensor(indices: Any) -> tuple[npt.NDArray[Any], Kind]:
    """Returns the `indices` input of a request: integers [N,h,w], as UINT16 if they fit, else as INT32."""
    array, kind = to_numpy(indices, "indices")
    limit = "integers 0..2147483647 of shape [N,h,w]"
    if array.dtype.kind not in "ui" or array.ndim != 3 or array.size == 0:
        raise invalid("indices", limit, found=f"{array.dtype} {list(array.shape)}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 2**31 - 1:
        raise invalid("indices", limit, value=low if low < 0 else high)
    return array.astype(np.uint16 if high < 2**16 else np.int32, copy=False), kind


def gradient_tensors(
    gradients: Any, shape: tuple[int, ...] | None, dtype: str = "FP16"
) -> dict[str, npt.NDArray[Any]]:
    """Returns the inputs `gradients` and, for FP16 and INT8, `gradient_scales` float32 [N].

    A gradient is its scale times its value. FP16: each sample's scale is the power of two that puts its largest
    value just below 2^15 (as far as fp32 has such a scale), so that values down to 2^-38 of the largest survive.
    INT8: the scale is the largest magnitude over 127, and values are rounded to the nearest. bfloat16 tensors are
    sent as float32 would be. `shape` is that of the images, None for encoded ones. Raises InvalidRequest.
    """
    torch: Any = sys.modules.get("torch")
    on_torch = torch is not None and isinstance(gradients, torch.Tensor)
    if on_torch:  # scaled on the device it is on: a GPU needs no time for it, and half the bytes leave it
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
    if dtype not in GRADIENT_DTYPES:
        raise invalid("gradient_dtype", f"one of {', '.join(GRADIENT_DTYPES)}", value=dtype)
    if on_torch:
        low, high = array.reshape(len(array), -1).aminmax(dim=1)
        largest = np.maximum(high.cpu().numpy(), -low.cpu().numpy()).astype(np.float32)
    else:
        largest = largest_magnitudes(array).astype(np.float32)
    if not np.isfinite(largest).all():
        sample = int(np.argmin(np.isfinite(largest)))
        raise invalid("gradients", "finite", found=f"NaN or infinity in sample {sample}")
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
    """Returns each sample divided by its scale, clipped to ±limit and rounded to `dtype` (int8 or float16)."""
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
