"""The reference engine: the unchanged modules of the package taming-transformers in fp32."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, mark_non_finite


class ReferenceEngine(Engine):
    """Runs Encoder, VectorQuantizer2 and Decoder of taming-transformers with `model`'s weights, loaded strictly.

    It is deliberately slow. This project only calls the published modules in order, so that an engine that agrees
    with this one agrees with the published code.
    """

    name = "reference"

    def __init__(self, model: VQGAN, device: torch.device) -> None:
        try:
            from taming.modules.diffusionmodules.model import Decoder, Encoder
            from taming.modules.vqvae.quantize import VectorQuantizer2
        except ImportError as error:
            raise RuntimeError("the reference engine needs: pip install 'dat-service[reference]'") from error
        spec = model.spec
        geometry: dict[str, Any] = {
            "ch": spec.ch,
            "out_ch": 3,
            "ch_mult": spec.ch_mult,
            "num_res_blocks": spec.num_res_blocks,
            "attn_resolutions": list(spec.attn_resolutions),
            "in_channels": 3,
            "resolution": spec.resolution,
            "z_channels": spec.z_channels,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # the published modules print messages
            self.encoder = Encoder(**geometry, double_z=False)
            self.decoder = Decoder(**geometry)
            self.quantize = VectorQuantizer2(spec.codebook_size, spec.latent_dim, beta=0.25, sane_index_shape=True)
        self.quant_conv = torch.nn.Conv2d(spec.z_channels, spec.latent_dim, 1)
        self.post_quant_conv = torch.nn.Conv2d(spec.latent_dim, spec.z_channels, 1)
        for part in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"):
            module = getattr(self, part)
            module.load_state_dict(getattr(model, part).state_dict(), strict=True)
            module.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        z = self.quant_conv(self.encoder(images.to(self.device) * 2 - 1))
        indices: Tensor = self.quantize(z)[2][2]
        return mark_non_finite(indices, z)

    @torch.inference_mode()
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        z = self.quantize.embedding(indices.to(self.device).clamp(min=0)).permute(0, 3, 1, 2).contiguous()
        images: Tensor = self.decoder(self.post_quant_conv(z))
        return (images + 1) / 2
