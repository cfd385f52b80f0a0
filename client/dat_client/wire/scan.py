"""Finds the extreme values of a tensor, by comparing floats as integers where numpy is slow with floats.

The bit patterns of non-negative floats, read as integers, have the same order as the floats. numpy finds the
maximum of 16-bit integers about 150 times as fast as the maximum of float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def range_outside_0_1(images: npt.NDArray[Any]) -> tuple[float, float] | None:
    """Returns the smallest and the largest value of float16/float32 `images`; None if all values lie in 0..1.

    Both are NaN if any value is NaN. Negative zero counts as 0.

    >>> range_outside_0_1(np.array([0, 0.5, 1.5], np.float16))
    (0.0, 1.5)
    """
    native = images.astype(images.dtype.newbyteorder("="), copy=False)
    unsigned, bits_of_1 = (np.uint16, 0x3C00) if native.itemsize == 2 else (np.uint32, 0x3F800000)
    # A bit pattern above that of 1.0 is a number above 1 or NaN, or has the sign bit: a number below 0, or -0.0.
    if native.view(unsigned).max() <= bits_of_1:
        return None
    with np.errstate(invalid="ignore"):
        low, high = float(native.min()), float(native.max())
    return None if low >= 0 and high <= 1 else (low, high)


def largest_magnitudes(gradients: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Returns the largest |g| of each sample of float16, float32 or int8 `gradients` [N,...], as float64 [N].

    The result for a sample that contains infinity or NaN is infinity or NaN.
    """
    samples = gradients.reshape(len(gradients), -1)
    largest: npt.NDArray[Any]
    if gradients.dtype == np.float16:
        highest = samples.view(np.int16).max(1)  # negative if no value is positive
        # The magnitude of the negative value furthest from 0, or `highest` again if no value is negative.
        magnitude = (samples.view(np.uint16).max(1) & 0x7FFF).astype(np.int16)
        largest = np.maximum(highest, magnitude).view(np.float16)
    else:
        largest = np.maximum(samples.max(1).astype(np.float64), -samples.min(1).astype(np.float64))
    return largest.astype(np.float64, copy=False)
