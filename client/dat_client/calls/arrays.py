"""What a trainer holds (numpy, torch, encoded pictures) to what the wire carries, and back again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dat_client.errors import InvalidRequest, shown
from dat_client.wire.scan import largest_magnitudes, range_outside_0_1
from dat_client.wire.vocabulary import GRADIENT_DTYPES

IMAGES_LIMIT = "uint8 0..255, or float16/float32 in 0..1, of shape [N,3,H,W]"

_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # how JPEG, PNG and WebP files begin


@dataclass(frozen=True)
class Kind:
    """Where arrays came from, for answers to go back there: numpy (`torch` is None) or torch on a device."""

    torch: Any = None
    device: Any = None

    def restore(self, array: npt.NDArray[Any]) -> Any:
        """The array as numpy, or as a tensor on the device; there uint16 becomes int64, to index with."""
        if self.torch is None:
            return array
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        if not (array.flags.aligned and array.flags.writeable):
            array = array.copy()
        return self.torch.from_numpy(array).to(self.device)


def to_numpy(value: Any, field: str) -> tuple[npt.NDArray[Any], Kind]:
    """A numpy view (a copy for a tensor that is elsewhere) of a numpy array or torch tensor, and its kind.

    torch is looked up in sys.modules: whoever passes a tensor has imported it, and nobody else pays for it.
    """
    if isinstance(value, np.ndarray):
        return value, Kind()
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        hint = "; np.stack or torch.stack makes one array of a list" if isinstance(value, (list, tuple)) else ""
        raise InvalidRequest(
            f"{field}: neither a numpy array nor a torch tensor, got {type(value).__name__}{hint}",
            field=field,
            value=type(value).__name__,
            limit="numpy.ndarray or torch.Tensor",
        )
    kind = Kind(torch, value.device)
    try:
        return value.detach().cpu().numpy(), kind
    except TypeError:  # bfloat16 and other dtypes that numpy lacks
        raise InvalidRequest(
            f"{field}: dtype {value.dtype} has no numpy counterpart; use .half() or .float()",
            field=field,
            value=str(value.dtype),
            limit=IMAGES_LIMIT,
        ) from None


def images_tensor(images: Any) -> tuple[npt.NDArray[Any], Kind]:
    """The `images` input of a request, checked before any byte is sent.

    Args:
        images: uint8 [N,3,H,W] 0..255, or float16/float32 [N,3,H,W] in 0..1, numpy or torch; or a sequence
            of N encoded JPEG, PNG or WebP files as bytes.

    Raises:
        InvalidRequest: with the field, the offending value and the limit.
    """
    if isinstance(images, (bytes, bytearray, memoryview)):
        raise InvalidRequest(
            "images: one encoded picture is not a batch; pass [picture]",
            field="images",
            value=type(images).__name__,
        )
    if isinstance(images, np.ndarray) and images.dtype.kind == "O":
        images = images.reshape(-1).tolist()
    if isinstance(images, Sequence) and len(images) and isinstance(images[0], (bytes, bytearray, memoryview)):
        return _encoded_pictures(images), Kind()
    array, kind = to_numpy(images, "images")
    _check_images(array)
    return array, kind


def _encoded_pictures(pictures: Sequence[Any]) -> npt.NDArray[Any]:
    tensor = np.empty(len(pictures), object)
    for index, picture in enumerate(pictures):
        is_bytes = isinstance(picture, (bytes, bytearray, memoryview))
        data = bytes(picture) if is_bytes else b""
        if not data.startswith(_PICTURES):
            found = shown(data[:8]) if is_bytes else type(picture).__name__
            raise InvalidRequest(
                f"images[{index}]: no JPEG, PNG or WebP file, begins with {found}",
                field=f"images[{index}]",
                value=found,
                limit="encoded JPEG, PNG or WebP",
            )
        tensor[index] = data
    return tensor


def _check_images(array: npt.NDArray[Any]) -> None:
    def refuse(problem: str, value: Any) -> InvalidRequest:
        return InvalidRequest(
            f"images: {problem}, must be {IMAGES_LIMIT}", field="images", value=value, limit=IMAGES_LIMIT
        )

    shape, dtype = list(array.shape), array.dtype
    if dtype.kind == "f" and dtype.itemsize == 8:
        raise refuse("dtype float64 is twice the bytes for nothing; use .astype(np.float32) or .float()", "float64")
    if (dtype.kind, dtype.itemsize) not in (("u", 1), ("f", 2), ("f", 4)):
        raise refuse(f"dtype {dtype}", str(dtype))
    if len(shape) == 3 and shape[0] == 3:
        raise refuse(f"shape {shape} is a single image; pass images[None]", shape)
    if len(shape) == 4 and shape[3] == 3 and shape[1] != 3:
        raise refuse(f"shape {shape} has its channels last; transpose to [N,3,H,W]", shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise refuse(f"shape {shape}", shape)
    if dtype != np.uint8 and (outside := range_outside_0_1(array)) is not None:
        raise refuse("values from {:g} to {:g}".format(*outside), list(outside))


def indices_tensor(indices: Any) -> tuple[npt.NDArray[Any], Kind]:
    """The `indices` input of a request: integers [N,h,w], as UINT16 where they fit, else INT32."""
    array, kind = to_numpy(indices, "indices")
    limit = "integers 0..2147483647 of shape [N,h,w]"
    if array.dtype.kind not in "ui" or array.ndim != 3 or array.size == 0:
        found = f"{array.dtype} {list(array.shape)}"
        raise InvalidRequest(f"indices: {found}, must be {limit}", field="indices", value=found, limit=limit)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 2**31 - 1:
        bad = low if low < 0 else high
        raise InvalidRequest(f"indices: {bad}, must be {limit}", field="indices", value=bad, limit=limit)
    return array.astype(np.uint16 if high < 2**16 else np.int32, copy=False), kind


def gradient_tensors(
    gradients: Any, shape: tuple[int, ...] | None, dtype: str = "FP16"
) -> dict[str, npt.NDArray[Any]]:
    """The inputs `gradients` and, for FP16 and INT8, `gradient_scales` float32 [N]: gradient = scale times value.

    FP16: each sample's scale is the power of two that puts its largest value just below 2^15 (as far as fp32 has
    such a scale), so that what is 2^-38 of the largest still survives. INT8: it is the largest magnitude over 127,
    values are rounded to the nearest. bfloat16 tensors are taken as float32. `shape` is that of the images, None
    for encoded ones. Raises InvalidRequest.
    """
    torch: Any = sys.modules.get("torch")
    on_torch = torch is not None and isinstance(gradients, torch.Tensor)
    if on_torch:  # scaled where they are: on a GPU that takes no time, and half the bytes leave it
        array = gradients.detach()
        array = array.float() if array.dtype == torch.bfloat16 else array
    else:
        array, _ = to_numpy(gradients, "gradients")
    limit = f"float16 or float32 of shape {list(shape) if shape else '[N,3,H,W]'}"

    def refuse(found: str) -> InvalidRequest:
        return InvalidRequest(f"gradients: {found}, must be {limit}", field="gradients", value=found, limit=limit)

    name = str(array.dtype).removeprefix("torch.")
    if name not in ("float16", "float32"):
        raise refuse(f"dtype {name}")
    if array.ndim != 4 or array.shape[1] != 3 or 0 in array.shape or (shape and tuple(array.shape) != shape):
        raise refuse(f"shape {list(array.shape)}")
    if dtype not in GRADIENT_DTYPES:
        allowed = ", ".join(GRADIENT_DTYPES)
        raise InvalidRequest(
            f"gradient_dtype: must be one of {allowed}, got {shown(dtype)}",
            field="gradient_dtype", value=dtype, limit=allowed,
        )  # fmt: skip
    if on_torch:
        low, high = array.reshape(len(array), -1).aminmax(dim=1)
        largest = np.maximum(high.cpu().numpy(), -low.cpu().numpy()).astype(np.float32)
    else:
        largest = largest_magnitudes(array).astype(np.float32)
    if not np.isfinite(largest).all():
        raise refuse(f"NaN or infinity in sample {int(np.argmin(np.isfinite(largest)))}")
    if dtype == "FP32":
        return {"gradients": array.float().cpu().numpy() if on_torch else array.astype(np.float32, copy=False)}
    if dtype == "INT8":
        scales = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny)  # never 0, to divide by
        return {"gradients": _divided(array, scales, 127, round_to=np.int8), "gradient_scales": scales}
    exponents = np.maximum(np.frexp(largest)[1] - 15, -126)  # frexp(0) is 0; -126: scales stay normal numbers
    scales = np.ldexp(np.float32(1), exponents).astype(np.float32)
    # the next fp16 after 32752 is 2^15, which times the largest scale is infinity
    return {"gradients": _divided(array, scales, 32752, round_to=np.float16), "gradient_scales": scales}


def _divided(array: Any, scales: npt.NDArray[np.float32], limit: int, round_to: type) -> npt.NDArray[Any]:
    """Each sample over its scale, clipped to ±limit, as numpy of the dtype `round_to` (rounded to the nearest)."""
    to_integers = round_to is np.int8
    if not isinstance(array, np.ndarray):
        torch: Any = sys.modules["torch"]
        values = array.float() / torch.from_numpy(scales).to(array.device)[:, None, None, None]
        values = values.clamp_(-limit, limit)
        rounded = values.round_().to(torch.int8) if to_integers else values.half()
        return rounded.cpu().numpy()  # type: ignore[no-any-return]
    quotients = array.astype(np.float32, copy=False) / scales[:, None, None, None]
    np.clip(quotients, -limit, limit, out=quotients)
    return (np.rint(quotients, out=quotients) if to_integers else quotients).astype(round_to)
