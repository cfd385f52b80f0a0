"""Loads a codec's weights, under other names, into diffusers' `VQModel`, for comparison."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN

# published name -> diffusers' name, in this order (diffusers/models/autoencoders/vae.py, unets/unet_2d_blocks.py)
RENAMED = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def diffusers_weights(model: VQGAN) -> dict[str, Tensor]:
    """Returns the codec's weights under diffusers' names.

    diffusers counts the levels of the decoder from below, and has linear layers for the 1x1 convolutions of
    attention.
    """
    top = len(model.decoder.up) - 1
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        renamed = re.sub(r"decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{top - int(m[1])}.", name)
        for pattern, replacement in RENAMED:
            renamed = re.sub(pattern, replacement, renamed)
        if ".attentions." in renamed and weight.ndim == 4:
            weight = weight[:, :, 0, 0]
        weights[renamed] = weight
    return weights


def as_vqmodel(model: VQGAN) -> Any:
    """Returns the codec as diffusers.VQModel, fp32, eval. Raises ImportError if diffusers is not installed."""
    from diffusers import VQModel

    spec = model.spec
    attention = [bool(level.attn) for level in model.encoder.down]
    vqmodel = VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
        block_out_channels=tuple(spec.widths),
        layers_per_block=spec.num_res_blocks,
        latent_channels=spec.z_channels,
        sample_size=spec.resolution,
        num_vq_embeddings=spec.codebook_size,
        norm_num_groups=32,
        vq_embed_dim=spec.latent_dim,
    )
    vqmodel.load_state_dict(diffusers_weights(model), strict=True)
    return vqmodel.eval().requires_grad_(False)
