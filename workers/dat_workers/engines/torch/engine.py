"""Our own engine: the published order of operations on a CPU, half precision and every trick on CUDA."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, mark_non_finite, rows_at_once
from dat_workers.engines.torch import network
from dat_workers.engines.torch.graphs import SIZES, Graphed
from dat_workers.engines.torch.tricks import Tricks


class TorchEngine(Engine):
    """Runs a VQGAN in PyTorch, with whichever of `Tricks` are on.

    Without tricks and in fp32 it is codecs/vqgan.py as it stands. In every other precision the layers of
    `fast.network.FP32_LAYERS` stay fp32: δ is 7 % of a grey level (DESIGN.md, "Numerics"), which half precision
    pixels do not hold. `mixed`, the default on CUDA, keeps the whole encoder in fp32 for the same reason.
    """

    name = "torch"

    def __init__(self, model: VQGAN, device: torch.device, dtype: str, tricks: str = "auto") -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.dtype = ("mixed" if cuda else "fp32") if dtype == "auto" else dtype
        self.tricks = Tricks.parse(tricks, cuda=cuda)
        if self.dtype == "tf32" and not cuda:
            raise ValueError(f"dtype is 'tf32', which is a way of CUDA's; device is {str(device)!r}")
        triton = self.tricks.fused_norm or self.tricks.fused_codebook
        if cuda and triton and importlib.util.find_spec("triton") is None:
            raise ValueError(
                f"tricks is {str(self.tricks)!r}: fused_norm and fused_codebook need Triton, which PyTorch's wheels"
                " for CUDA bring along; pip install triton, or --tricks all,-fused_norm,-fused_codebook"
            )
        # One at a time on a CPU: as fast (its caches hold one), and CPU kernels add in another order for another
        # batch size, which would make an image's tokens depend on its company.
        self.batch = SIZES[-1] if cuda else 1
        self.model = network.build(model, self.dtype, self.tricks).to(device).eval().requires_grad_(False)
        self._run_encode: Callable[[Tensor], Tensor] = self._encode
        self._run_decode: Callable[[Tensor], Tensor] = self._decode
        if self.tricks.graphs:
            pool = torch.cuda.graph_pool_handle()
            self._run_encode, self._run_decode = Graphed(self._encode, pool), Graphed(self._decode, pool)

    def warm_up(self, side: int) -> None:
        """Captures the graphs for images of `side` x `side`; raises what that raises. Without graphs, nothing."""
        factor = self.model.spec.factor
        if not isinstance(self._run_encode, Graphed) or not isinstance(self._run_decode, Graphed) or side % factor:
            return
        with self._current():
            for size in reversed(SIZES):  # the largest first: the others fit into its memory
                if size > rows_at_once(self, side * side):
                    continue
                self._run_encode.capture(torch.full((size, 3, side, side), 0.5, device=self.device))
                tokens = (size, side // factor, side // factor)
                self._run_decode.capture(torch.zeros(tokens, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        with self._current():
            return self._run_encode(images.to(self.device))

    @torch.inference_mode()
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        with self._current():
            return self._run_decode(indices.to(self.device, torch.int64))

    def _current(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the current device, whichever its tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> Tensor:
        with network.tf32(self.dtype == "tf32"):
            z = self.model.latents(images.mul(2).sub_(1))
        return mark_non_finite(self.model.quantize.nearest(z), z)

    @torch.inference_mode()
    def _decode(self, indices: Tensor) -> Tensor:
        with network.tf32(self.dtype == "tf32"):
            pictures = self.model.pictures(self.model.quantize.lookup(indices.clamp(min=0)))
        return pictures.float().add_(1).div_(2)
