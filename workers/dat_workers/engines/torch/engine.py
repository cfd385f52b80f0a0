"""The engine for CUDA, with half precision and all tricks; on a CPU it runs the published order of operations."""

from __future__ import annotations

import contextlib
import importlib.util

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, mark_non_finite, rows_at_once
from dat_workers.engines.torch import network
from dat_workers.engines.torch.graphs import SIZES, GraphedFunction
from dat_workers.engines.torch.precision import arithmetic
from dat_workers.engines.torch.tricks import Tricks


class TorchEngine(Engine):
    """Runs a VQGAN in PyTorch, with the chosen optimisations (`Tricks`).

    Without tricks and in fp32 it runs codecs/networks/vqgan.py unchanged. In every other precision the layers of
    `network.FP32_LAYERS` still compute in fp32, because δ is about 7 % of a grey level, too little for pixels in
    half precision. For the same reason `mixed`, the default on CUDA, keeps the whole encoder in fp32.
    """

    name = "torch"

    def __init__(self, model: VQGAN, device: torch.device, dtype: str, tricks: str = "auto") -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.dtype = ("mixed" if cuda else "fp32") if dtype == "auto" else dtype
        self.tricks = Tricks.parse(tricks, cuda=cuda)
        if self.dtype == "tf32" and not cuda:
            raise ValueError(f"dtype is 'tf32', which needs CUDA, but device is {str(device)!r}")
        triton = self.tricks.fused_norm or self.tricks.fused_codebook
        if cuda and triton and importlib.util.find_spec("triton") is None:
            raise ValueError(
                f"tricks is {str(self.tricks)!r}, but fused_norm and fused_codebook need Triton, which comes with "
                "PyTorch's wheels for CUDA. Run pip install triton, or use --tricks all,-fused_norm,-fused_codebook"
            )
        # On a CPU one image at a time is as fast, because its caches hold only one. Besides, the order of additions
        # depends on the batch size there, which would make an image's tokens depend on the rest of its batch.
        self.batch = SIZES[-1] if cuda else 1
        self.model = network.build(model, self.dtype, self.tricks).to(device).eval().requires_grad_(False)
        pool = torch.cuda.graph_pool_handle() if self.tricks.graphs else None
        self._run_encode = GraphedFunction(self._encode, pool)
        self._run_decode = GraphedFunction(self._decode, pool)

    def warm_up(self, side: int) -> None:
        """Captures the CUDA graphs for images of `side` x `side`, if graphs are on. Raises the errors of CUDA."""
        factor = self.model.spec.factor
        if not self.tricks.graphs or side % factor:
            return
        with self._device_context():
            for size in reversed(SIZES):  # largest first, so that the smaller graphs reuse its memory
                if size > rows_at_once(self, side * side):
                    continue
                self._run_encode.capture(torch.full((size, 3, side, side), 0.5, device=self.device))
                indices_shape = (size, side // factor, side // factor)
                self._run_decode.capture(torch.zeros(indices_shape, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        with self._device_context():
            return self._run_encode(images.to(self.device))

    @torch.inference_mode()
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        with self._device_context():
            return self._run_decode(indices.to(self.device, torch.int64))

    def _device_context(self) -> contextlib.AbstractContextManager[object]:
        """Makes the engine's device current, because Triton launches on the current device, not on the tensors'."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _arithmetic(self) -> contextlib.AbstractContextManager[None]:
        cuda = self.device.type == "cuda"
        return arithmetic(tf32=self.dtype == "tf32") if cuda else contextlib.nullcontext()

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> Tensor:
        with self._arithmetic():
            z = self.model.latents(images.mul(2).sub_(1))
        return mark_non_finite(self.model.quantize.nearest(z), z)

    @torch.inference_mode()
    def _decode(self, indices: Tensor) -> Tensor:
        with self._arithmetic():
            images = self.model.pictures(self.model.quantize.lookup(indices.clamp(min=0)))
        return images.float().add_(1).div_(2)
