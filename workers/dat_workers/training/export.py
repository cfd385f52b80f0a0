"""Turns a trained network into the weights of a codec file."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN

FP32_PREFIXES = ("quantize.", "quant_conv.", "post_quant_conv.")  # fp16 is coarser than the codebook's spacing


@torch.no_grad()
def exported_weights(model: VQGAN, *, half: bool) -> dict[str, Tensor]:
    """Returns the state dict of `model` with a centred codebook, which computes the same codec.

    With `half` the weights are fp16, except for the codebook and its 1x1 convolutions. Centring shifts the latent
    vectors and the codebook by the same vector, and corrects the decoder's bias. It changes nothing but rounding:
    distances between smaller vectors lose fewer digits, so fewer tokens are near-ties.
    """
    centred = copy.deepcopy(model).cpu().float()
    codebook = centred.quantize.embedding.weight
    mean = codebook.mean(0)
    codebook -= mean
    quant_bias, post_bias = centred.quant_conv.bias, centred.post_quant_conv.bias
    assert quant_bias is not None
    assert post_bias is not None
    quant_bias -= mean
    post_bias += centred.post_quant_conv.weight[:, :, 0, 0] @ mean
    return {
        name: tensor.half() if half and not name.startswith(FP32_PREFIXES) else tensor
        for name, tensor in centred.state_dict().items()
    }
