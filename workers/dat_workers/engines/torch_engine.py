"""Our own engine: fp32 on CPU, half precision on CUDA where tokens allow it."""

from __future__ import annotations

import torch
from torch import Tensor

from dat_workers.codecs.vqgan import VQGAN
from dat_workers.engines import checked_latents

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine:
    """Runs `dat_workers.codecs.vqgan` in eager PyTorch.

    In half precision the first convolution, the last one before the codebook and the distances stay fp32:
    δ is 7 % of a grey level (DESIGN.md, "Numerics"), which fp16 pixels do not hold, and latents rounded to
    11 bits flip tokens by themselves.
    """

    name = "torch"

    def __init__(self, model: VQGAN, device: torch.device, dtype: str) -> None:
        self.device = device
        self.dtype = ("fp16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype
        # One at a time on a CPU: as fast (its caches hold one), and CPU kernels add in another order for another
        # batch size, which would make an image's tokens depend on its company.
        self.batch = 64 if device.type == "cuda" else 1
        self.model = model.to(device).eval().requires_grad_(False)

    def _half(self) -> torch.autocast:
        return torch.autocast(self.device.type, HALF.get(self.dtype, torch.bfloat16), enabled=self.dtype in HALF)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        encoder = self.model.encoder
        h = encoder.conv_in(images.to(self.device).mul(2).sub_(1))
        with self._half():
            h = encoder.body(h)
        z = self.model.quant_conv(encoder.head(h.float()))
        return self.model.quantize.nearest(checked_latents(z)).cpu()

    @torch.inference_mode()
    def decode(self, indices: Tensor) -> Tensor:
        z = self.model.quantize.lookup(indices.to(self.device))
        with self._half():
            pictures = self.model.pictures(z)
        return pictures.float().add_(1).div_(2).cpu()
