"""Rebuilds a VQGAN for speed, with the tricks that are on; the mathematics and the parameters stay the same.

`build` copies the network and replaces each layer for which there is a faster implementation. The names, the order
and the forward passes of codecs/networks/vqgan.py stay, so that a single file describes what Q computes.
"""

from __future__ import annotations

import contextlib
import copy
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
    ResnetBlock,
    Upsample,
    swish,
)
from dat_workers.engines.torch.precision import arithmetic
from dat_workers.engines.torch.tricks import Tricks

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "mixed": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

# The layers that compute in fp32 at every precision: the beginning of each name, and the reason. A layer added here
# runs in fp32 and returns fp32; nothing else has to be changed.
FP32_LAYERS = {
    "encoder.conv_in": "reads the pixels; with α = 0.1 and `l2`, δ is 2.6e-4, too small for fp16 pixels in 0..1",
    "encoder.norm_out": "feeds the last convolution before the codebook",
    "encoder.conv_out": "rounding latents to 11 bits changes tokens even without δ",
    "quant_conv": "its output goes into the distances, as that of encoder.conv_out",
    "quantize": "two distances often differ by less than half precision can represent",
}

# The fp32 layers of `mixed`, whose rounding must change fewer tokens than δ does. Measured with `tiny-f8` on a CPU
# in fp32, with the rounding of lower precisions emulated: of the tokens that δ changes, an encoder in fp16
# preserves 27 %, one with only its middle in fp16 67 %, one in TF32 51 % and one in bf16 2 % (docs/tiny-f8.md has
# the table).
MIXED_FP32_LAYERS = FP32_LAYERS | {"encoder": "11 bits of mantissa anywhere in it are as coarse as δ"}


def needs_fp32(name: str, precision: str) -> bool:
    """Returns True if the fp32 layers of this precision include the layer `name` or a module that contains it."""
    listed = MIXED_FP32_LAYERS if precision == "mixed" else FP32_LAYERS
    return any(f"{name}.".startswith(f"{layer}.") for layer in listed)


def build(model: VQGAN, precision: str, tricks: Tricks) -> VQGAN:
    """Returns `model` as a network of `precision` (fp32, tf32, mixed, fp16, bf16) with `tricks`.

    The result is `model` itself if neither requires a change, and a copy otherwise. It has the interface of a
    VQGAN: it maps images fp32 in -1..1 to latents fp32, and latents fp32 to images of its own dtype. For the
    precision tf32 the caller must run the result inside `arithmetic(tf32=True)`; the layers of FP32_LAYERS switch
    TF32 off for themselves.
    """
    if precision == "fp32" and replace(tricks, graphs=False, overlap=False) == Tricks():
        return model
    network = copy.deepcopy(model)
    _convert(network, "", precision, tricks)
    if tricks.fused_norm:
        for name, block in model.named_modules():
            if isinstance(block, ResnetBlock):
                assert block.conv1.bias is not None
                _move_bias(network.get_submodule(name), block.conv1.bias)
    if not needs_fp32("encoder", precision):
        # conv_in computes in fp32, but returns the dtype of the layers after it.
        first: nn.Module = network.encoder.conv_in
        assert isinstance(first, Convolution)
        first.out = DTYPES[precision]
    return network


def _convert(module: nn.Module, prefix: str, precision: str, tricks: Tricks) -> None:
    """Replaces every layer inside `module` for which there is a faster implementation."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        exact = needs_fp32(full, precision)
        faster = _faster(child, torch.float32 if exact else DTYPES[precision], tricks)
        if faster is None:
            _convert(child, f"{full}.", precision, tricks)
            continue
        for part in faster.modules():
            if isinstance(part, Convolution):
                part.exact = exact and precision == "tf32"
        setattr(module, name, faster.requires_grad_(False).eval())


def _move_bias(block: nn.Module, bias: Tensor) -> None:
    """Moves the fp32 bias of a block's first convolution into the norm after it.

    On CUDA, PyTorch adds the bias of a convolution in a pass of its own over its output.
    """
    convolution, norm = block.conv1, block.norm2
    assert isinstance(convolution, Convolution)
    assert isinstance(norm, FastNorm)
    convolution.bias, norm.shift = None, nn.Parameter(bias.detach().float(), requires_grad=False)


def _faster(layer: nn.Module, dtype: torch.dtype, tricks: Tricks) -> nn.Module | None:
    """Returns the replacement of a layer, or None if the layer stays and only its children may be replaced."""
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
    """A convolution that takes any dtype, computes in the dtype of its weights and returns the dtype `out`."""

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
        self.exact = False  # whether to switch TF32 off, which only the precision tf32 switches on

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.nhwc:
            x = x.contiguous(memory_format=torch.channels_last)
        with arithmetic(tf32=False) if self.exact else contextlib.nullcontext():
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).to(self.out)


class FastNorm(nn.Module):
    """GroupNorm, followed by swish if `norm` has it; computed in fp32 and rounded once to `dtype`."""

    def __init__(self, norm: Norm, dtype: torch.dtype, *, fused: bool) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(norm.weight.detach().float()),
            nn.Parameter(norm.bias.detach().float()),
        )
        self.eps, self.swish, self.dtype, self.fused = norm.eps, isinstance(norm, NormSwish), dtype, fused
        # fp32 [C], added to the input: the bias of the convolution before it
        self.shift: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and x.is_cuda:
            from dat_workers.engines.torch import kernels  # imported here because it needs Triton

            return kernels.norm_swish(
                x, self.weight, self.bias, self.shift, eps=self.eps, swish=self.swish, dtype=self.dtype
            )
        h = x.float() if self.shift is None else x.float() + self.shift[:, None, None]
        h = h.contiguous()  # of the copies in fp32, only the last one stays in memory
        h = F.group_norm(h, 32, self.weight, self.bias, self.eps)
        return (swish(h) if self.swish else h).to(self.dtype)


def folded_kernels(weight: Tensor) -> Tensor:
    """Returns four 2x2 kernels [4·C_out,C_in,2,2] that equal nearest x2 and a 3x3 convolution [C_out,C_in,3,3].

    The taps w0, w1, w2 of an output pixel in an even row read rows i-1, i, i of the small image; in an odd row they
    read rows i, i, i+1. Two taps read the same row, so they are added. The same holds for columns. The order of the
    phases is (even, even), (even, odd), (odd, even), (odd, odd). The zero padding of the enlarged image corresponds
    to zero padding of the small image. Sums are computed in fp64, so that each weight is rounded once.
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
    """Computes `Upsample` as one convolution of the small image, with 4 taps per output pixel instead of 9."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, nhwc: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        # With this padding the output has one more row and column than a phase needs; each phase uses a window of
        # it.
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
    """Computes `AttnBlock` with q, k and v from one product; with `sdpa` the attention weights are never in memory.

    q is scaled before it is multiplied with k, because sums of 512 unscaled products exceed 65504, the largest
    number of fp16.
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
        # [N,h·w,3C]; this is a view if the tensor is in NHWC order
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
