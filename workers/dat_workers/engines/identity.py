"""The engine of the codec `identity`: its "tokens" are the pixels themselves, so Q(x) = x."""

from __future__ import annotations

from torch import Tensor

from dat_workers.engines.base import Engine


class IdentityEngine(Engine):
    """Returns images unchanged, so that everything around the codec runs without weights and without a GPU.

    Metadata and metrics name this engine "none", because nothing is computed.
    """

    name = "none"
    dtype = "none"
    batch = 64
    returns_images_unchanged = True

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        return indices
