"""Rebuilds a VQGAN for speed: the same mathematics with the same parameters, by the tricks that are on.

`build` copies the network and replaces each layer for which there is a faster one. The names, the order and the
forward passes of codecs/networks/vqgan.py stay, so that one file describes what Q computes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_workers.codecs.networks.vqgan import (
    LARGE_ATTENTION,
    VQGAN,
    AttnBlock,
    Codebook,
    Norm,
    NormSwish,
    Upsample,
    swish,
)
from dat_workers.engines.torch.tricks import Tricks

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "mixed": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

# The layers that compute in fp32 whatever the others do, by the beginning of their names, and the reason. A layer
# added here runs in fp32 and returns fp32; nothing else has to be changed.
FP32_LAYERS = {
    "encoder.conv_in": "takes the pixels: with α = 0.1 and `l2`, δ is 2.6e-4 of 1, which fp16 pixels do not hold",
    "encoder.norm_out": "feeds the last convolution before the codebook",
    "encoder.conv_out": "latents rounded to 11 bits flip tokens by themselves",
    "quant_conv": "as encoder.conv_out: its output goes into the distances",
    "quantize": "two distances are often nearer to each other than half precision tells apart",
}

# The same for `mixed`, which must change fewer tokens by its rounding than δ does. Measured with `tiny-f8` in fp32
# on a CPU, the roundings of the other precisions emulated: an encoder in fp16 keeps 27 % of the tokens that δ
# changes, with only its middle in fp16 67 %, in TF32 51 %, in bf16 2 % (docs/tiny-f8.md has the table).
MIXED_FP32_LAYERS = FP32_LAYERS | {"encoder": "11 bits of mantissa anywhere in it are as coarse as δ"}


def needs_fp32(name: str, precision: str) -> bool:
    """Whether the list of this precision contains the layer of that name, or a module around it."""
    listed = MIXED_FP32_LAYERS if precision == "mixed" else FP32_LAYERS
    return any(f"{name}.".startswith(f"{layer}.") for layer in listed)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Sets, inside the block, whether CUDA may round the factors of fp32 products to 10 bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def build(model: VQGAN, precision: str, tricks: Tricks) -> VQGAN:
    """Returns `model` as a network of `precision` (fp32, tf32, mixed, fp16, bf16) with `tricks`.

    That is `model` itself if neither asks for a change, else a copy. Its interface is that of a VQGAN: images fp32
    in -1..1 to latents fp32, latents fp32 to images of its own dtype. For tf32 call it inside `tf32(True)`: the
    layers of FP32_LAYERS switch it off for themselves.
    """
    if precision == "fp32" and replace(tricks, graphs=False, overlap=False) == Tricks():
        return model
    network = copy.deepcopy(model)
    _convert(network, "", precision, tricks)
    if not needs_fp32("encoder", precision):
        # conv_in computes in fp32, but the layers after it do not: from here on the residual stream has their dtype
        first: nn.Module = network.encoder.conv_in
        assert isinstance(first, Convolution)
        first.out = DTYPES[precision]
    return network


def _convert(module: nn.Module, prefix: str, precision: str, tricks: Tricks) -> None:
    """Replaces every layer below `module` for which there is a faster one."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        exact = needs_fp32(full, precision)
        faster = _faster(child, torch.float32 if exact else DTYPES[precision], tricks)
        if faster is None:
            _convert(child, f"{full}.", precision, tricks)
            continue
        for part in faster.modules():
            if isinstance(part, Convolution):
                part.exact = exact
        setattr(module, name, faster.requires_grad_(False).eval())


def _faster(layer: nn.Module, dtype: torch.dtype, tricks: Tricks) -> nn.Module | None:
    """Returns the replacement of a layer, or None if its children should be looked at instead."""
    nhwc = tricks.channels_last
    match layer:
        case Norm():
            return FastNorm(layer, dtype, fused=tricks.fused_norm)
        case nn.Conv2d():
            return Convolution(layer.weight, layer.bias, dtype, layer.stride[0], int(layer.padding[0]), nhwc=nhwc)
        case Upsample() if tricks.folded_upsample:
            return FoldedUpsample(layer.conv, dtype, nhwc=nhwc)
        case AttnBlock() if tricks.sdpa or dtype != torch.float32:
            return FastAttention(layer, dtype, tricks)
        case Codebook() if tricks.fused_codebook:
            return FusedCodebook(layer)
    return None


class Convolution(nn.Module):
    """A convolution that takes any dtype, computes in that of its weights and returns `out`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        stride: int = 1,
        padding: int = 0,
        *,
        nhwc: bool,
    ) -> None:
        super().__init__()
        order = torch.channels_last if nhwc else torch.contiguous_format
        self.weight = nn.Parameter(weight.detach().to(dtype).contiguous(memory_format=order))
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype))
        self.stride, self.padding, self.nhwc, self.out = stride, padding, nhwc, dtype
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.nhwc:
            x = x.contiguous(memory_format=torch.channels_last)
        with tf32(False) if self.exact else contextlib.nullcontext():
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).to(self.out)


class FastNorm(nn.Module):
    """GroupNorm, with swish if the layer has it, in fp32, rounded once to `dtype`."""

    def __init__(self, norm: Norm, dtype: torch.dtype, *, fused: bool) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(norm.weight.detach().float()),
            nn.Parameter(norm.bias.detach().float()),
        )
        self.eps, self.swish, self.dtype, self.fused = norm.eps, isinstance(norm, NormSwish), dtype, fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and x.is_cuda:
            from dat_workers.engines.torch import kernels  # here, since it needs Triton, which a CPU does not

            return kernels.norm_swish(x, self.weight, self.bias, eps=self.eps, swish=self.swish, dtype=self.dtype)
        h = F.group_norm(x.float().contiguous(), 32, self.weight, self.bias, self.eps)
        return (swish(h) if self.swish else h).to(self.dtype)


def folded_kernels(weight: Tensor) -> Tensor:
    """Returns the four 2x2 kernels [4·C_out,C_in,2,2] that equal nearest x2 and a 3x3 convolution [C_out,C_in,3,3].

    An output pixel in an even row sees rows i-1, i, i of the small image through the taps w0, w1, w2, one in an odd
    row sees rows i, i, i+1: two taps meet the same row and are added. The same holds for columns. The order of the
    phases is (even, even), (even, odd), (odd, even), (odd, odd). Zeros around the enlarged image are zeros around
    the small one. Sums are taken in fp64, so that a weight is rounded once.
    """
    w = weight.double()
    rows = (
        torch.stack((w[:, :, 0], w[:, :, 1] + w[:, :, 2]), 2),
        torch.stack((w[:, :, 0] + w[:, :, 1], w[:, :, 2]), 2),
    )
    phases = []
    for r in rows:
        phases.append(torch.stack((r[..., 0], r[..., 1] + r[..., 2]), 3))
        phases.append(torch.stack((r[..., 0] + r[..., 1], r[..., 2]), 3))
    return torch.cat(phases)


class FoldedUpsample(nn.Module):
    """Upsample as one convolution of the small image: 4 taps per output pixel instead of 9."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, nhwc: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        # With this padding the output has one row and one column more than a phase: each phase takes its window.
        self.conv = Convolution(folded_kernels(conv.weight), conv.bias.repeat(4), dtype, padding=1, nhwc=nhwc)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        phases = self.conv(x)
        channels = phases.shape[1] // 4
        order = torch.channels_last if self.conv.nhwc else torch.contiguous_format
        size = (n, channels, 2 * height, 2 * width)
        out = torch.empty(size, dtype=phases.dtype, device=phases.device, memory_format=order)
        for phase, part in enumerate(phases.split(channels, 1)):
            a, b = divmod(phase, 2)
            out[:, :, a::2, b::2] = part[:, :, a : a + height, b : b + width]
        return out


class FastAttention(nn.Module):
    """AttnBlock with q, k and v from one product; with `sdpa` its attention weights are never in memory.

    q is scaled before the product, because sums of 512 unscaled products exceed 65504, the largest number of fp16.
    """

    def __init__(self, block: AttnBlock, dtype: torch.dtype, tricks: Tricks) -> None:
        super().__init__()
        self.norm = FastNorm(block.norm, dtype, fused=tricks.fused_norm)
        weights, biases = zip(*((conv.weight, conv.bias) for conv in (block.q, block.k, block.v)), strict=True)
        self.qkv = Convolution(torch.cat(weights), torch.cat(biases), dtype, nhwc=tricks.channels_last)
        self.proj_out = Convolution(block.proj_out.weight, block.proj_out.bias, dtype, nhwc=tricks.channels_last)
        self.sdpa = tricks.sdpa

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # [N,h·w,3C], which is a view if the tensor is NHWC
        q, k, v = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(n, height * width, 3 * c).chunk(3, 2)
        if self.sdpa or height * width > LARGE_ATTENTION:
            h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            weights = torch.bmm(q * c**-0.5, k.transpose(1, 2)).softmax(2, dtype=torch.float32)
            h = torch.bmm(weights.to(v.dtype), v)
        projected: Tensor = self.proj_out(h.reshape(n, height, width, c).permute(0, 3, 1, 2))
        return x + projected


class FusedCodebook(Codebook):
    """The codebook, searched by one kernel on CUDA."""

    def __init__(self, codebook: Codebook) -> None:
        nn.Module.__init__(self)
        self.embedding = codebook.embedding

    def nearest(self, z: Tensor) -> Tensor:
        if not z.is_cuda:
            return super().nearest(z)
        from dat_workers.engines.torch import kernels

        n, d, height, width = z.shape
        flat = z.float().permute(0, 2, 3, 1).reshape(-1, d)
        indices: Tensor = kernels.nearest(flat, self.embedding.weight.float()).view(n, height, width)
        return indices
