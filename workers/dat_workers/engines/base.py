"""The base class of all engines. An engine turns images into indices and indices into images, nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dat_workers.engines.torch.tricks import Tricks


class Engine(ABC):
    """Runs the encoder, the codebook search and the decoder of one codec.

    Tensors come and go on `device`; their height and width are multiples of the codec's factor f.
    """

    name: str
    device = torch.device("cpu")
    dtype = "fp32"
    tricks = Tricks()  # the optimisations that are on
    batch = 1  # images of 224 x 224 that are worth computing together
    returns_images_unchanged = False  # Q(x) = x: a request for the reconstruction alone need not be computed

    def describe(self) -> dict[str, str]:
        """Returns engine, device, dtype and tricks as text, for logs, metrics and metadata."""
        return {
            "engine": self.name, "device": str(self.device), "dtype": self.dtype, "tricks": str(self.tricks),
        }  # fmt: skip

    def warm_up(self, side: int) -> None:  # noqa: B027  most engines have nothing to prepare
        """Does what has to be done once before images of `side` x `side` arrive."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Returns the indices, int64 [N,H/f,W/f], of images fp32 [N,3,H,W] in 0..1.

        An image whose latent vectors are not finite gets -1 everywhere: token 0 would be the nearest to a NaN.
        """

    @abstractmethod
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        """Returns the images, fp32 [N,3,H,W], of indices [N,h,w].

        Values lie about in 0..1 and are not clipped, so that the caller can see an overflow. `exact`: the images
        will be encoded again, so decode them with the least rounding error available.
        """


def rows_at_once(engine: Engine, pixels: int) -> int:
    """Returns how many images of `pixels` pixels to compute together.

    The number is a power of two, like the batch sizes of the CUDA graphs. It shrinks as images grow, since memory
    grows with the pixels.
    """
    rows = max(1, min(engine.batch, engine.batch * 224 * 224 // pixels))
    return 1 << (rows.bit_length() - 1)


def mark_non_finite(indices: Tensor, z: Tensor) -> Tensor:
    """Returns `indices` [N,h,w], with -1 throughout each image whose latent vectors `z` [N,d,h,w] are not finite.

    It does not raise: asking whether all are finite would wait for the GPU, and a CUDA graph cannot ask at all.
    """
    return indices.where(z.isfinite().flatten(1).all(1)[:, None, None], -1)
