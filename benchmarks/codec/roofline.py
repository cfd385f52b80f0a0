"""A small roofline model that predicts what each trick of the torch engine is worth on a GPU.

Every kernel of a pass takes max(FLOP / reachable FLOP/s, bytes / bandwidth). A pass takes the sum of its kernels,
or the time to launch them if that is longer. The assumptions are:

- A convolution or matrix product reaches CONV_SHARE of the measured matrix-multiply peak of its precision.
- Activations have the bytes of their layer's precision and travel to memory once for each kernel that reads or
  writes them: at 64 images of 224² a full-size activation is 0.8 GB in half precision, more than any cache. Weights
  are not counted.
- The dtypes are those of the torch engine, and `split`, which is not built: the encoder's convolutions as three
  half-precision products of high and low parts, which together have the bytes of fp32.
- Without channels_last, cuDNN turns the input of a convolution to NHWC and its output back: two kernels.
- A bias is a kernel of its own (read and write), and so is a residual sum (two reads, one write).
- PyTorch's GroupNorm reads twice and writes once, sigmoid reads and writes, and the product reads twice and writes.
  On channels_last tensors GroupNorm first copies to NCHW, and the next convolution copies back.
- The fused norm reads twice and writes once, swish included, and so is the bias of the convolution before it, where
  that convolution is the first of a residual block.
- A folded upsample has 4/9 of the FLOP, never writes the enlarged tensor, and interleaves four phases (a copy).
- Plain attention moves its matrix six times (product, scale, softmax, product); SDPA never writes it.
- Plain distances are fp32, written once and read once. Fused ones never leave the chip.
- CUDA graphs remove the time of the launches and nothing else. `overlap` concerns copies from the host, which Q on
  device tensors does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dat_workers.codecs.networks.vqgan import VQGAN, AttnBlock, ResnetBlock, Upsample
from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines.torch.network import needs_fp32

TRICKS = ("channels_last", "fused_norm", "folded_upsample", "sdpa", "fused_codebook", "graphs", "overlap")

DTYPES = ("fp32", "tf32", "mixed", "split", "fp16", "bf16")

# Share of the matrix-multiply peak that large convolutions (128 to 512 channels) are taken to reach.
CONV_SHARE = 0.7


@dataclass(frozen=True)
class Limits:
    """A machine's FLOP/s by precision, bytes/s and seconds for a launch, and their source."""

    half: float
    tf32: float
    fp32: float
    bandwidth: float
    launch_s: float
    source: str


# For predictions without a GPU. Half precision was measured on an H200, and TF32 is taken as half of it; fp32 is
# NVIDIA's data sheet's. Of its 4.8 TB/s, 4.3 are taken to be reached. The time of a launch is an assumption.
H200 = Limits(
    790e12, 395e12, 67e12, 4.3e12, 5e-6,
    "H200: 790 TFLOP/s fp16 measured; assumed: 395 tf32, 67 fp32, 4.3 TB/s, 5 µs a launch",
)  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """Says how a layer computes: its rate (a field of Limits), products for one, and bytes of an activation."""

    unit: str
    products: int
    bytes: int


FP32, TF32, SPLIT = Arithmetic("fp32", 1, 4), Arithmetic("tf32", 1, 4), Arithmetic("half", 3, 4)
HALF = Arithmetic("half", 1, 2)


def arithmetic_of(layer: str, dtype: str) -> Arithmetic:
    """Returns how the layer of this name computes, for one of DTYPES."""
    if dtype == "fp32" or needs_fp32(layer, "fp16"):
        return FP32
    if dtype == "tf32":
        return TF32
    if dtype in ("mixed", "split") and needs_fp32(layer, "mixed"):
        return SPLIT if dtype == "split" else FP32
    return HALF


@dataclass(frozen=True)
class Kernel:
    """One kernel's work for one image; `flop` counts a product once, however many its arithmetic needs for it."""

    flop: float
    bytes: float
    launches: int = 1
    arithmetic: Arithmetic = HALF

    def seconds(self, limits: Limits, images: int) -> float:
        """Returns the seconds for a batch of that many images."""
        reachable = CONV_SHARE * float(getattr(limits, self.arithmetic.unit))
        return images * max(self.flop * self.arithmetic.products / reachable, self.bytes / limits.bandwidth)


@functools.cache
def flop(spec: CodecSpec, size: int) -> dict[str, int]:
    """Returns the FLOP of encoder and decoder for one image, size x size; multiply and add count as two.

    >>> from dat_workers.codecs.registry import get
    >>> {k: round(v / 1e9) for k, v in flop(get("vqgan-openimages-f8-16384"), 224).items()}
    {'encode': 172, 'decode': 360}
    """
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    with torch.device("meta"):
        model, images = VQGAN(spec), torch.empty(1, 3, size, size)
        side = size // spec.factor
        indices = torch.zeros(1, side, side, dtype=torch.int64)
        for name, call in (("encode", lambda: model.encode(images)), ("decode", lambda: model.decode(indices))):
            with FlopCounterMode(display=False) as counter:
                call()  # type: ignore[no-untyped-call]
            counted[name] = int(counter.get_total_flops())
    return counted


def kernels(spec: CodecSpec, size: int, tricks: Collection[str], dtype: str) -> list[Kernel]:
    """Returns the kernels of one Q with these tricks, found by running the network on tensors without data."""
    found: list[Kernel] = []
    with torch.device("meta"):
        model = VQGAN(spec)
        for name, module in model.named_modules():
            cost = _of_module(name, module, tricks, arithmetic_of(name, dtype))
            if cost is not None:
                module.register_forward_hook(_counting(cost, found))
        model.pictures(model.latents(torch.empty(1, 3, size, size)))
    distances = (size // spec.factor) ** 2 * spec.codebook_size
    fused = "fused_codebook" in tricks
    moved = 0 if fused else 2 * 4 * distances
    return [*found, Kernel(2 * distances * spec.latent_dim, moved, 1 if fused else 5, FP32)]


def predict(
    spec: CodecSpec, size: int, images: int, tricks: Collection[str], limits: Limits, dtype: str = "mixed"
) -> float:
    """Returns the seconds that Q takes for a batch of that many images in one of DTYPES."""
    work = kernels(spec, size, tricks, dtype)
    launching = 0.0 if "graphs" in tricks else limits.launch_s * sum(kernel.launches for kernel in work)
    return max(launching, sum(kernel.seconds(limits, images) for kernel in work))


# From the input and the output of a module to the kernels of its call.
Cost = Callable[[Tensor, Tensor], list[Kernel]]


def _counting(cost: Cost, found: list[Kernel]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend(cost(inputs[0], output))

    return hook


def _of_module(name: str, module: nn.Module, tricks: Collection[str], how: Arithmetic) -> Cost | None:
    """Returns the cost of a module without its children; None if it does not compute anything itself."""
    if isinstance(module, nn.Conv2d):
        folded = name.endswith("upsample.conv") and "folded_upsample" in tricks
        bias = not (name.endswith(".conv1") and "fused_norm" in tricks)
        return lambda x, y: _convolution(module, x, y, "channels_last" in tricks, how, folded, bias)
    if isinstance(module, nn.GroupNorm):
        swish = ".attn" not in name
        return lambda x, y: _norm(x, swish, "channels_last" in tricks, "fused_norm" in tricks, how)
    if isinstance(module, AttnBlock):
        return lambda x, y: [*_attention(x, "sdpa" in tricks, FP32 if how is SPLIT else how), _sum(x, how)]
    if isinstance(module, ResnetBlock):
        return lambda x, y: [_sum(y, how)]
    if isinstance(module, Upsample) and "folded_upsample" not in tricks:
        return lambda x, y: [Kernel(0, how.bytes * (x.numel() + y.numel()))]
    return None


def _convolution(
    conv: nn.Conv2d, x: Tensor, y: Tensor, channels_last: bool, how: Arithmetic, folded: bool, bias: bool
) -> list[Kernel]:
    size = how.bytes
    flop = 2.0 * y.numel() * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    read = x.numel()
    found = [Kernel(0, size * 2 * y.numel())] if bias else []
    if folded:  # x is the enlarged tensor, which no longer exists
        flop, read = flop * 4 / 9, read // 4
        found.append(Kernel(0, size * 2 * y.numel()))
    found.append(Kernel(flop, size * (read + y.numel()), 4 if folded else 1, how))
    if not channels_last and how.unit != "fp32":
        found.append(Kernel(0, size * 2 * (read + y.numel()), 2))
    return found


def _norm(x: Tensor, swish: bool, channels_last: bool, fused: bool, how: Arithmetic) -> list[Kernel]:
    if fused:
        return [Kernel(0, how.bytes * 3 * x.numel(), 2)]
    passes = 3 + (5 if swish else 0) + (4 if channels_last else 0)
    return [Kernel(0, how.bytes * passes * x.numel(), 2 + (2 if swish else 0) + (2 if channels_last else 0))]


def _attention(x: Tensor, sdpa: bool, how: Arithmetic) -> list[Kernel]:
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    flop, vectors, matrix = 4.0 * positions**2 * channels, 4 * channels * positions, positions**2
    if sdpa:
        return [Kernel(flop, how.bytes * vectors, 1, how)]
    return [
        Kernel(flop, how.bytes * (vectors + 2 * matrix), 2, how),
        Kernel(0, how.bytes * 4 * matrix, 2),
    ]


def _sum(y: Tensor, how: Arithmetic) -> Kernel:
    return Kernel(0, how.bytes * 3 * y.numel())
