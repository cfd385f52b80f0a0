"""How a codec is run. An engine turns images into indices and indices into pictures, nothing else."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dat_workers.engines.torch.tricks import Tricks


class Engine(Protocol):
    """What the discretizer asks of an engine. Tensors come and go on `device`; H and W are multiples of f."""

    name: str
    device: torch.device
    dtype: str
    tricks: Tricks  # those that are on
    batch: int  # images of 224 x 224 that are worth handing over at once

    def warm_up(self, side: int) -> None:
        """Whatever is done once, before images of `side` x `side` come."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Indices int64 [N,H/f,W/f] of images fp32 [N,3,H,W] in 0..1.

        -1 throughout an image whose latent vectors are not finite: the nearest entry to a NaN would be token 0.
        """
        ...

    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        """Pictures fp32 [N,3,H,W] of indices [N,h,w], about 0..1: not clipped, so that an overflow can be seen.

        `exact`: of which tokens are to be made again, so with as little rounding of its own as the engine can do.
        """
        ...


def rows_at_once(engine: Engine, pixels: int) -> int:
    """Images of so many pixels to hand over at once: memory goes with the pixels, and graphs with powers of two."""
    rows = max(1, min(engine.batch, engine.batch * 224 * 224 // pixels))
    return 1 << (rows.bit_length() - 1)


def mark_non_finite(indices: Tensor, z: Tensor) -> Tensor:
    """`indices` [N,h,w] with -1 throughout each image whose latent vectors `z` [N,d,h,w] are not all finite.

    Marked and not raised: to ask whether all is finite would wait for the GPU, and a CUDA graph cannot ask at all.
    """
    return indices.where(z.isfinite().flatten(1).all(1)[:, None, None], -1)
