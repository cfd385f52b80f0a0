"""Converts numpy arrays, torch tensors and encoded pictures to the numpy arrays that are sent, and answers back."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dat_client.errors import invalid, shown
from dat_client.wire.scan import range_outside_0_1

IMAGES_LIMIT = "uint8 0..255, or float16/float32 in 0..1, of shape [N,3,H,W]"

_MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # the beginnings of JPEG, PNG and WebP files


@dataclass(frozen=True)
class Kind:
    """The kind of arrays that the caller passed and gets back: numpy (`torch` is None), or torch on `device`."""

    torch: Any = None
    device: Any = None

    def restore(self, array: npt.NDArray[Any]) -> Any:
        """Returns a numpy array in the caller's kind: the array itself, or a torch tensor on `device`.

        torch tensors of uint16 cannot be used as indices, so unsigned integers of 2 bytes or more become int64.
        """
        if self.torch is None:
            return array
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        if not (array.flags.aligned and array.flags.writeable):
            array = array.copy()
        return self.torch.from_numpy(array).to(self.device)


def to_numpy(value: Any, field: str) -> tuple[npt.NDArray[Any], Kind]:
    """Returns a numpy array or torch tensor as numpy, together with its kind.

    Nothing is copied, except from a device that is not the CPU. torch is looked up in sys.modules instead of being
    imported: a caller who passes a tensor has imported it already. Raises InvalidRequest, naming `field`, if
    `value` is neither an array nor a tensor, or has a dtype that numpy lacks (bfloat16).
    """
    if isinstance(value, np.ndarray):
        return value, Kind()
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        hint = "join the list with np.stack or torch.stack" if isinstance(value, list | tuple) else None
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, str | os.PathLike):
            hint = "pass the bytes of the files: [pathlib.Path(path).read_bytes() for path in paths]"
        raise invalid(field, "a numpy array or a torch tensor", found=type(value).__name__, hint=hint)
    try:
        return value.detach().cpu().numpy(), Kind(torch, value.device)
    except TypeError:  # numpy lacks bfloat16 and some other dtypes
        hint = "convert it with .half() or .float()"
        raise invalid(field, "of a dtype that numpy has", found=f"dtype {value.dtype}", hint=hint) from None


def images_tensor(images: Any) -> tuple[npt.NDArray[Any], Kind]:
    """Checks the images of a call and returns them as the request's input `images`, together with their kind.

    Args:
        images: uint8 [N,3,H,W] 0..255, or float16/float32 [N,3,H,W] in 0..1, numpy or torch; or a sequence
            of N encoded JPEG, PNG or WebP files as bytes.

    Raises:
        InvalidRequest: `images` is nothing of that; the message has the offending value and the limit.
    """
    if isinstance(images, bytes | bytearray | memoryview):
        found = f"one encoded picture, {type(images).__name__}"
        raise invalid("images", "a sequence of pictures", found=found, hint="pass a list of it: [picture]")
    if isinstance(images, np.ndarray) and images.dtype.kind == "O":
        images = images.reshape(-1).tolist()
    if isinstance(images, Sequence) and len(images) and isinstance(images[0], bytes | bytearray | memoryview):
        return _encoded_pictures(images), Kind()
    array, kind = to_numpy(images, "images")
    _check_images(array)
    return array, kind


def _encoded_pictures(pictures: Sequence[Any]) -> npt.NDArray[Any]:
    """Returns N encoded pictures as an object array [N] of bytes; raises InvalidRequest for any other element."""
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
            hint = "convert it with .astype(np.float32) or .float()"
    elif len(shape) == 3 and shape[0] == 3:
        hint = "this is a single image, pass images[None]"
    elif len(shape) == 4 and shape[3] == 3 and shape[1] != 3:
        hint = "these images are channels last, transpose them to [N,3,H,W]"
    elif len(shape) == 4 and shape[1] == 3 and 0 not in shape:
        outside = None if dtype == np.uint8 else range_outside_0_1(array)
        if outside is None:
            return
        found = f"values from {outside[0]:g} to {outside[1]:g}"
    raise invalid("images", IMAGES_LIMIT, found=found, hint=hint)


def indices_tensor(indices: Any) -> tuple[npt.NDArray[Any], Kind]:
    """Returns the request's input `indices` [N,h,w], together with its kind.

    The dtype is uint16 if all values are below 2^16, else int32. Raises InvalidRequest unless `indices` are
    integers in 0..2147483647 with 3 axes.
    """
    array, kind = to_numpy(indices, "indices")
    limit = "integers 0..2147483647 of shape [N,h,w]"
    if array.dtype.kind not in "ui" or array.ndim != 3 or array.size == 0:
        raise invalid("indices", limit, found=f"{array.dtype} {list(array.shape)}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 2**31 - 1:
        raise invalid("indices", limit, value=low if low < 0 else high)
    return array.astype(np.uint16 if high < 2**16 else np.int32, copy=False), kind
