"""The engine for CUDA, with half precision and every trick; on a CPU it keeps the published order of operations."""

from __future__ import annotations

import contextlib
import importlib.util

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, mark_non_finite, rows_at_once
from dat_workers.engines.torch import network
from dat_workers.engines.torch.graphs import SIZES, GraphedFunction
from dat_workers.engines.torch.tricks import Tricks


class TorchEngine(Engine):
    """Runs a VQGAN in PyTorch, with those of `Tricks` that are on.

    Without tricks and in fp32 it is codecs/networks/vqgan.py as it stands. In every other precision the layers of
    `network.FP32_LAYERS` stay fp32: δ is about 7 % of a grey level, too little for half precision pixels. `mixed`,
    the default on CUDA, keeps the whole encoder in fp32 for the same reason.
    """

    name = "torch"

    def __init__(self, model: VQGAN, device: torch.device, dtype: str, tricks: str = "auto") -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.dtype = ("mixed" if cuda else "fp32") if dtype == "auto" else dtype
        self.tricks = Tricks.parse(tricks, cuda=cuda)
        if self.dtype == "tf32" and not cuda:
            raise ValueError(f"dtype is 'tf32', which exists on CUDA alone; device is {str(device)!r}")
        triton = self.tricks.fused_norm or self.tricks.fused_codebook
        if cuda and triton and importlib.util.find_spec("triton") is None:
            raise ValueError(
                f"tricks is {str(self.tricks)!r}: fused_norm and fused_codebook need Triton, which comes with "
                "PyTorch's wheels for CUDA; pip install triton, or use --tricks all,-fused_norm,-fused_codebook"
            )
        # On a CPU one image at a time is as fast (its caches hold one), and CPU kernels add in another order for
        # another batch size, which would make an image's tokens depend on the rest of its batch.
        self.batch = SIZES[-1] if cuda else 1
        self.model = network.build(model, self.dtype, self.tricks).to(device).eval().requires_grad_(False)
        pool = torch.cuda.graph_pool_handle() if self.tricks.graphs else None
        self._run_encode = GraphedFunction(self._encode, pool)
        self._run_decode = GraphedFunction(self._decode, pool)

    def warm_up(self, side: int) -> None:
        """Captures the CUDA graphs, if they are on, for images of `side` x `side`; raises the errors of CUDA."""
        factor = self.model.spec.factor
        if not self.tricks.graphs or side % factor:
            return
        with self._device_context():
            for size in reversed(SIZES):  # the largest first, since the others fit into its memory
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
        """Makes the engine's device current: Triton launches on the current device, wherever its tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> Tensor:
        with network.tf32(self.dtype == "tf32"):
            z = self.model.latents(images.mul(2).sub_(1))
        return mark_non_finite(self.model.quantize.nearest(z), z)

    @torch.inference_mode()
    def _decode(self, indices: Tensor) -> Tensor:
        with network.tf32(self.dtype == "tf32"):
            images = self.model.pictures(self.model.quantize.lookup(indices.clamp(min=0)))
        return images.float().add_(1).div_(2)
