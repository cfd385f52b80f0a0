"""One request after its checks: rows of arrays, and what is computed of each row."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from dat_workers.batching.device_copies import Array
from dat_workers.errors import InvalidInput
from dat_workers.perturbation import PRESETS, Step

OUTPUT_DTYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
OUTPUTS = ("reconstruction", "adversarial", "indices", "adversarial_indices")


@dataclass(frozen=True)
class Task:
    """What is computed of a row, apart from the row itself: rows of equal tasks may share a batch.

    `size`: height and width of the pictures that come out. `given`: name and dtype of each array.
    """

    size: tuple[int, int]
    given: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    dtype: np.dtype[Any]
    step: Step = PRESETS["paper"]
    replace_fraction: float = 0.0
    seed: int = 0

    @property
    def decodes(self) -> bool:
        """Whether tokens are decoded, without a picture before them."""
        return self.given[0][0] == "indices"

    @property
    def adversarial(self) -> bool:
        return any(name.startswith("adversarial") for name in self.outputs)

    @property
    def cost(self) -> float:
        """What a row costs, in passes through the codec times pixels: a decoder counts twice an encoder."""
        encodes, decodes = (0, 1) if self.decodes else (1, int("reconstruction" in self.outputs))
        if self.adversarial:
            from_q = self.step.base == "reconstruction"
            encodes += 2 if from_q else 1
            decodes = max(decodes, from_q) + int("adversarial" in self.outputs)
        return (encodes + 2 * decodes) * float(self.size[0] * self.size[1])


@dataclass(frozen=True)
class Work:
    """A request that may be computed: `arrays` by name, each [N,...]; or its `result`, where that is known."""

    task: Task
    arrays: dict[str, Array]
    result: dict[str, Array] | None = None

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))


def default_outputs(attacked: bool) -> tuple[str, ...]:
    """What is made where no output is named: `adversarial` too, where there is something to make it from."""
    return ("reconstruction", "adversarial") if attacked else ("reconstruction",)


def pick_output_dtype(name: str | None, default: np.dtype[Any]) -> np.dtype[Any]:
    """The numpy dtype that an `output_dtype` parameter names."""
    if name is None:
        return default
    if not isinstance(name, str) or name not in OUTPUT_DTYPES:
        raise InvalidInput("output_dtype", repr(name), "UINT8, FP16 or FP32")
    return np.dtype(OUTPUT_DTYPES[name])


def check_outputs(outputs: Collection[str], known: Collection[str]) -> None:
    """Raises InvalidInput for an output that is not one of `known`."""
    for name in outputs:
        if name not in known:
            raise InvalidInput("outputs", repr(name), f"of {', '.join(known)}")


def check_images(images: Array, least: int) -> None:
    """Raises InvalidInput unless `images` is uint8 or float16/32 in 0..1, [N,3,H,W], N > 0, sides >= `least`."""
    if images.dtype not in (np.uint8, np.float16, np.float32):
        raise InvalidInput("images", f"dtype {images.dtype}", "UINT8, FP16 or FP32")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) < 1:
        raise InvalidInput("images", f"shape {list(images.shape)}", "[N,3,H,W] with N of 1 or more")
    if min(images.shape[2:]) < least:
        raise InvalidInput("images", f"{images.shape[2]}x{images.shape[3]} pixels", f"sides of {least} or more")
    if images.dtype != np.uint8 and not within_0_1(images):
        low, high = float(images.min()), float(images.max())  # a NaN anywhere makes both NaN
        if not (low >= 0 and high <= 1):
            raise InvalidInput("images", f"a value range of {low:.9g}..{high:.9g}", "finite values in 0..1")


def within_0_1(images: Array) -> bool:
    """Whether all float16/32 lie in 0..1; False also for a negative zero.

    The bits of floats that are not negative are ordered as the floats are, and all others lie above 1.0: one pass
    over integers, where numpy's fp16 minimum and maximum are two slow ones.
    """
    if images.dtype == np.float16:
        return bool(images.view(np.uint16).max() <= 0x3C00)
    return bool(images.view(np.uint32).max() <= 0x3F800000)


def largest_magnitudes(gradients: Array) -> Array:
    """The largest |g| of each sample, float64 [N]; infinity or NaN where a sample holds such a thing."""
    flat = gradients.reshape(len(gradients), -1)
    if gradients.dtype == np.int8:
        extremes: Array = np.maximum(flat.max(1).astype(np.float64), -flat.min(1).astype(np.float64))
        return extremes
    unsigned, magnitude = (np.uint16, 0x7FFF) if gradients.dtype == np.float16 else (np.uint32, 0x7FFFFFFF)
    bits: Array = np.bitwise_and(np.ascontiguousarray(flat).view(unsigned), unsigned(magnitude)).max(1)
    magnitudes: Array = bits.view(gradients.dtype).astype(np.float64)
    return magnitudes


def check_gradients(gradients: Array | None, scales: Array | None, shape: tuple[int, ...]) -> None:
    """Raises InvalidInput for what is no gradient of images of that shape, with a scale for each or with none."""
    if gradients is None:
        if scales is not None:
            raise InvalidInput("gradient_scales", "given without gradients", "gradients to scale")
        return
    if gradients.dtype not in (np.float16, np.float32, np.int8):
        raise InvalidInput("gradients", f"dtype {gradients.dtype}", "FP16, FP32, or INT8 with gradient_scales")
    if gradients.shape != shape:
        raise InvalidInput("gradients", f"shape {list(gradients.shape)}", f"{list(shape)}, that of the images")
    largest = largest_magnitudes(gradients)
    if not np.isfinite(largest).all():
        raise InvalidInput("gradients", "NaN or infinity", "finite values")
    if scales is None:
        if gradients.dtype == np.int8:
            raise InvalidInput("gradient_scales", "missing", "float32 [N], where gradients are INT8")
        return
    if scales.dtype != np.float32 or scales.shape != shape[:1]:
        raise InvalidInput("gradient_scales", f"{scales.dtype} {list(scales.shape)}", f"float32 [{shape[0]}]")
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise InvalidInput(
            "gradient_scales", "a value that is negative or not finite", "finite values of 0 or more"
        )
    if (largest * scales).max() > np.finfo(np.float32).max:
        raise InvalidInput("gradient_scales", f"up to {scales.max():g}", "scales that keep fp32 finite")


def check_indices(indices: Array, codec: str, codebook_size: int) -> None:
    """Raises InvalidInput unless `indices` is uint16 or int32 [N,h,w], each in 0..codebook_size-1."""
    if indices.dtype not in (np.uint16, np.int32):
        raise InvalidInput("indices", f"dtype {indices.dtype}", "UINT16 or INT32")
    if indices.ndim != 3 or min(indices.shape) < 1:
        raise InvalidInput("indices", f"shape {list(indices.shape)}", "[N,h,w], none of them 0")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= codebook_size:
        wrong = low if low < 0 else high
        raise InvalidInput("indices", wrong, f"0 to {codebook_size - 1} (codec {codec})")
