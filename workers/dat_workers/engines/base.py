"""The base class of all engines. An engine only encodes images to indices and decodes indices to images."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dat_workers.engines.torch.tricks import Tricks


class Engine(ABC):
    """Runs the encoder, the codebook search and the decoder of one codec.

    Arguments and results are tensors on `device`; the sides of images are multiples of the codec's factor f.
    """

    name: str
    device = torch.device("cpu")
    dtype = "fp32"
    tricks = Tricks()  # the optimisations that are on
    batch = 1  # how many images of 224 x 224 to compute together
    most_pixels: int | None = None  # of one image; more do not fit the memory of the device; None: not known
    most_rows = 0  # how many smaller images to compute together at most; 0 means `batch`
    returns_images_unchanged = False  # if True, requests for the reconstruction alone are not computed

    def describe(self) -> dict[str, str]:
        """Returns engine, device, dtype and tricks as text, for logs, metrics and metadata."""
        return {
            "engine": self.name, "device": str(self.device), "dtype": self.dtype, "tricks": str(self.tricks),
        }  # fmt: skip

    def warm_up(self, side: int) -> None:  # noqa: B027  most engines have nothing to prepare
        """Makes the preparations that are needed once before images of `side` x `side` are computed."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Returns the indices, int64 [N,H/f,W/f], of images fp32 [N,3,H,W] in 0..1.

        All indices of an image whose latent vectors are not finite are -1; a search would return token 0 for a NaN.
        """

    @abstractmethod
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        """Returns the images, fp32 [N,3,H,W], of indices [N,h,w].

        Values are in about 0..1 and are not clipped, so that the caller can detect an overflow. `exact` means that
        the images will be encoded again: they are decoded with the least rounding error available.
        """


def rows_at_once(engine: Engine, pixels: int) -> int:
    """Returns how many images of `pixels` pixels to compute together.

    The number is a power of two, like the batch sizes of the CUDA graphs. It is smaller for larger images, because
    memory and time grow with the number of pixels.
    """
    rows = max(1, min(engine.most_rows or engine.batch, engine.batch * 224 * 224 // pixels))
    return 1 << (rows.bit_length() - 1)


def mark_non_finite(indices: Tensor, z: Tensor) -> Tensor:
    """Returns `indices` [N,h,w], with -1 throughout each image whose latent vectors `z` [N,d,h,w] are not finite.

    It marks images instead of raising an error, because a check on the host would wait for the GPU and is
    impossible inside a CUDA graph.
    """
    return indices.where(z.isfinite().flatten(1).all(1)[:, None, None], -1)
