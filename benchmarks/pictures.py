"""Images for measurements."""

from __future__ import annotations

from typing import Any

import numpy as np

from dat_workers.images.crops import sample_crops


def shifted_photographs(number: int, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns uint8 [number,3,side,side]: the photographs inside scikit-image, each shifted by another distance.

    Without scikit-image it returns smooth noise.

    >>> shifted_photographs(3, 16).shape
    (3, 3, 16, 16)
    """
    try:
        base = sample_crops(None, side, 4)
    except RuntimeError:
        coarse = np.random.default_rng(0).integers(0, 256, (4, 3, -(-side // 8), -(-side // 8)), np.uint8)
        base = coarse.repeat(8, 2).repeat(8, 3)[:, :, :side, :side]
    return np.stack([np.roll(base[i % len(base)], 5 * (i // len(base)), axis=2) for i in range(number)])
