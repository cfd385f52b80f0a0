"""Predicts by arithmetic the memory that a batch takes, so that batches fit a GPU, or a share of a GPU.

The arithmetic follows the forward passes of codecs/networks/vqgan.py and network.py: at each layer it adds up the
activations that exist at the same time. tests/workers/engines/torch/test_memory.py compares it with the tensors
that really exist. None of it was compared with a GPU's allocator yet.

    >>> from dat_workers.codecs.registry import get
    >>> plan = MemoryPlan(get("vqgan-openimages-f8-16384"), "mixed", Tricks.parse("all", cuda=True), int(196e6))
    >>> round(plan.needed(64, 224, 224) / 1e9, 1)
    6.3
    >>> fit(plan, 24 << 30, 0.5)
    Fit(batch=32, side=1784)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dat_workers.codecs.networks.vqgan import LARGE_ATTENTION
from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines.torch.network import needs_fp32
from dat_workers.engines.torch.tricks import Tricks
from dat_workers.errors import OutOfMemory

# What the CUDA context, the code of kernels, and the workspaces of cuDNN and cuBLAS take of a GPU's memory, or of a
# share of it. An assumption, to be looked at on a GPU.
FIXED_BYTES = 1 << 30
FRAGMENTS = 1.1  # blocks of the allocator that are too small for what comes next; an assumption, too
MOST_ROWS = 64
SIDE = 224
FP32 = 4
PLANES = 3 * FP32  # bytes of one pixel of an fp32 image
# Images of fp32 that the discretizer holds around the engine: x, Q(x), gradients, δ, x + δ, and copies under way.
HELD_IMAGES = 12
DISTANCES = 1 << 27  # computed at a time by the search without `fused_codebook`


@dataclass(frozen=True)
class Fit:
    """Says what fits a share of a GPU: the batch of 224 x 224 images, and the side of the largest square image."""

    batch: int
    side: int


def fit(plan: MemoryPlan, total: int, share: float) -> Fit:
    """Returns what fits `share` of a GPU that has `total` bytes of memory.

    It depends on nothing else, such as the memory that is free now, because other batch sizes may round otherwise.
    Raises OutOfMemory if not even one image of 224 x 224 fits.
    """
    budget = int(total * share) - FIXED_BYTES
    found = Fit(plan.rows_that_fit(budget), plan.largest_side(budget))
    if not found.batch:
        needed = (plan.needed(1, SIDE, SIDE) + FIXED_BYTES) / 1e9
        raise OutOfMemory(
            f"the codec {plan.spec.name} in {plan.precision} needs about {needed:.1f} GB of GPU memory for one "
            f"image of {SIDE} x {SIDE}, but has {total * share / 1e9:.1f} GB; use a larger GPU or share of it, or "
            "another dtype"
        )
    return found


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one codec at one precision (fp32, tf32, mixed, fp16, bf16) with these tricks."""

    spec: CodecSpec
    precision: str
    tricks: Tricks
    weights: int  # bytes

    def activations(self, images: int, height: int, width: int) -> tuple[int, int]:
        """Returns the most bytes of tensors that exist at a time while a batch is encoded, and while it is decoded.

        Height and width are multiples of f. The batch itself is counted, and so are the results, but no weights.
        """
        pixels = images * height * width
        # Indices of int64, up to three times, and the codebook's vectors.
        tokens = (3 * 8 + FP32 * self.spec.latent_dim) * pixels // self.spec.factor**2
        encode = max(images * max(self._encoder(height, width)), 2 * PLANES * pixels + self._search(pixels))
        return encode, images * max(self._decoder(height, width)) + tokens

    def needed(self, images: int, height: int, width: int) -> int:
        """Returns the bytes of GPU memory for batches of one size: weights, activations, and images around them."""
        pixels = images * height * width
        once = FRAGMENTS * max(self.activations(images, height, width))
        graphs = 4 * PLANES * pixels if self.tricks.graphs else 0  # inputs and outputs of the graphs of all sizes
        return int(self.weights + once + graphs + HELD_IMAGES * PLANES * pixels)

    def rows_that_fit(self, budget: int) -> int:
        """Returns the batch of 224 x 224 images to compute together, a power of two up to 64; 0 if none fits.

        With graphs, images of another size run beside them in memory of their own, which is counted, too.
        """
        rows = MOST_ROWS
        while rows and self._with_others(rows, SIDE) > budget:
            rows //= 2
        return rows

    def largest_side(self, budget: int) -> int:
        """Returns the side of the largest square image that fits alone, a multiple of f; 0 if none fits.

        Tiles of a larger image would give other tokens, because every GroupNorm averages over the whole image.
        """
        f = self.spec.factor
        low, high = 0, 1 << 17
        while high - low > 1:  # the memory grows with the side
            middle = (low + high) // 2
            low, high = (middle, high) if self._with_others(1, middle * f) <= budget else (low, middle)
        return low * f

    def _with_others(self, images: int, side: int) -> int:
        """Returns the bytes for these batches while the graphs for as many pixels of another size keep theirs."""
        f = self.spec.factor
        needed = self.needed(images, -(-side // f) * f, -(-side // f) * f)
        if not self.tricks.graphs:
            return needed
        rows = max(1, min(MOST_ROWS, images * side * side // SIDE**2))
        pool = FRAGMENTS * max(self.activations(rows, -(-SIDE // f) * f, -(-SIDE // f) * f))
        return int(needed + pool)

    def _bytes(self, half: str) -> int:
        """Returns the bytes of an activation inside the encoder or the decoder."""
        return FP32 if self.precision in ("fp32", "tf32") or needs_fp32(half, self.precision) else 2

    def _blocks(self, half: str, level: int) -> list[tuple[int, int]]:
        """Returns the channels of inputs and outputs of a level's residual blocks, in order."""
        widths = self.spec.widths
        if half == "encoder":
            before, count = widths[level - 1] if level else self.spec.ch, self.spec.num_res_blocks
        else:
            before, count = widths[min(level + 1, len(widths) - 1)], self.spec.num_res_blocks + 1
        return [(before, widths[level])] + [(widths[level], widths[level])] * (count - 1)

    def _search(self, pixels: int) -> int:
        if self.tricks.fused_codebook:
            return 0
        distances = pixels // self.spec.factor**2 * self.spec.codebook_size
        return 2 * FP32 * min(DISTANCES, distances)  # the sum of the norms, and the distances

    def _encoder(self, height: int, width: int) -> Iterator[int]:
        """Yields the bytes of one image that exist at each layer of the encoder."""
        spec, b, pixels = self.spec, self._bytes("encoder"), height * width
        image = 2 * PLANES * pixels  # in 0..1, and in -1..1
        copied = PLANES * pixels if self.tricks.channels_last else 0
        converted = spec.ch * b * pixels if b != FP32 else 0
        yield image + copied + spec.ch * FP32 * pixels + converted
        for level, channels in enumerate(spec.widths):
            for inputs, outputs in self._blocks("encoder", level):
                yield from (image + held for held in self._block(inputs, outputs, pixels, b))
                if level in spec.attention_levels:
                    yield from (image + held for held in self._attention(outputs, pixels, b))
            if level + 1 < len(spec.widths):
                padded = channels * b * (pixels + 2 * int(math.sqrt(pixels)) + 1)
                yield image + channels * b * pixels + padded + channels * b * pixels // 4
                pixels //= 4
        yield from (image + held for held in self._middle(pixels, b))
        yield from (image + held for held in self._norm(spec.widths[-1], pixels, b, FP32))

    def _decoder(self, height: int, width: int) -> Iterator[int]:
        """Yields the bytes of one image that exist at each layer of the decoder."""
        spec, b = self.spec, self._bytes("decoder")
        pixels = height * width // spec.factor**2
        yield from self._middle(pixels, b)
        for level in reversed(range(len(spec.widths))):
            for inputs, outputs in self._blocks("decoder", level):
                yield from self._block(inputs, outputs, pixels, b)
                if level in spec.attention_levels:
                    yield from self._attention(outputs, pixels, b)
            if level:
                # The image at its size, then either the four phases, or the enlarged image, and the result.
                yield spec.widths[level] * b * pixels * (1 + 4 + 4)
                pixels *= 4
        yield from self._norm(spec.widths[0], pixels, b, b)
        yield (2 * spec.widths[0] + 3) * b * pixels
        yield 3 * (b + FP32) * pixels

    def _middle(self, pixels: int, b: int) -> Iterator[int]:
        channels = self.spec.widths[-1]
        x = channels * b * pixels  # the input of the middle, which stays until its last module has run
        yield from (x + held for held in self._block(channels, channels, pixels, b))
        yield from (x + held for held in self._attention(channels, pixels, b))

    def _block(self, inputs: int, outputs: int, pixels: int, b: int) -> Iterator[int]:
        """Yields the bytes at each layer of a residual block."""
        x, h = inputs * b * pixels, outputs * b * pixels
        yield from self._norm(inputs, pixels, b, b)
        yield 2 * x + h  # conv1
        yield from (x + held for held in self._norm(outputs, pixels, b, b))
        yield x + 2 * h  # conv2; then the sum, and before it the shortcut
        if inputs != outputs:
            yield x + 3 * h

    def _norm(self, channels: int, pixels: int, b: int, result: int) -> Iterator[int]:
        """Yields the bytes while a GroupNorm with swish reads elements of b bytes and writes those of `result`."""
        elements = channels * pixels
        if not self.tricks.fused_norm:
            # In fp32: a contiguous copy where there must be one, and the norm; then the norm, sigmoid and product.
            copied = FP32 if b != FP32 or self.tricks.channels_last else 0
            yield elements * (b + copied + max(copied, FP32))
            yield elements * (b + 3 * FP32)
        yield elements * (b + result)

    def _attention(self, channels: int, positions: int, b: int) -> Iterator[int]:
        """Yields the bytes at each step of an attention block."""
        x, matrix = channels * b * positions, positions**2
        yield from self._norm(channels, positions, b, b)
        yield 5 * x  # the block's input, its norm, q, k and v
        if positions > LARGE_ATTENTION or self.tricks.sdpa:
            yield 5 * x + FP32 * positions
        elif b != FP32:  # q, k, v and the scaled q, then the weights as they are computed and in fp32
            yield 5 * x + matrix * (b + FP32)
        else:  # the norm is alive, too
            yield 5 * x + 2 * FP32 * matrix
        yield 7 * x  # q, k and v, the result, its projection, the sum
