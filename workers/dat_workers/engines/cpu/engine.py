"""The default engine on a CPU: PyTorch alone, with an encoder that rounds as published and a faster decoder.

The last bits of the latent vectors decide tokens, so the encoder runs the published operations in the published
order (codecs/networks/vqgan.py). The last bits do not affect how decoded images look: the images of a decoder that
rounds differently have a PSNR of 100 dB to the published decoder's. The decoder may therefore use other memory
layouts and fewer multiplications. Only images that are encoded again (the base of the preset `easyrobust`) are
decoded in the published order, too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_workers.codecs.networks.vqgan import VQGAN, Decoder, Level, ResnetBlock, Upsample
from dat_workers.engines.base import Engine, mark_non_finite
from dat_workers.engines.cpu.ball_search import BallSearch, pick_search
from dat_workers.engines.cpu.tiles import Tiles, for_tiles, tile_rows
from dat_workers.system.threads import DaemonThreads

CHANNELS_LAST = torch.channels_last
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # malloc.h


class CpuEngine(Engine):
    """Runs a VQGAN in fp32 on the CPU; an image's result is bit-equal whatever the other images of its batch.

    Large images are computed each by itself, two of them at a time if the engine has all cores. Small images are
    computed in tiles of several, each tile by one thread (`tiles.py`).

    >>> CpuEngine(load_model("tiny-f8"), torch.device("cpu")).dtype  # doctest: +SKIP
    'fp32'
    """

    name = "cpu"
    batch = 4  # so that the two threads that compute images wait for each other only once in four images

    def __init__(self, model: VQGAN, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(
                f"device is {str(device)!r}, but the engine 'cpu' runs only on a CPU; on CUDA use 'torch'"
            )
        self.device = device
        self.model = model.to(device).eval().requires_grad_(False)
        self.decoder = FastDecoder(model)
        self.search = pick_search(model.quantize)
        # PyTorch's threads wait for each other after every layer; a second image uses the cores that idle
        # meanwhile.
        all_cores = torch.get_num_threads() == len(os.sched_getaffinity(0)) > 1
        self.threads = DaemonThreads(2, "codec") if all_cores else None
        self.tiles = Tiles()
        self.tile_model, self.tile_decoder = for_tiles(self.model), for_tiles(self.decoder)
        self.most_rows = max(self.batch, 4 * self._tile_rows(32, 32))
        keep_freed_memory()

    def warm_up(self, side: int) -> None:
        spec = self.model.spec
        tokens = -(-side // spec.factor)  # along a side
        pixels = tokens * spec.factor
        rows = self._tile_rows(pixels, pixels)
        if rows > 1:
            self.tiles.prepare(self.tile_model.latents, (3, pixels, pixels), rows)
            self.tiles.prepare(self.tile_decoder, (spec.latent_dim, tokens, tokens), rows)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        x = images.mul(2).sub_(1)
        rows = self._tile_rows(*images.shape[2:])
        if rows > 1:
            return self.tiles.run(self.tile_model.latents, self._nearest_exactly, x, rows)
        return self._each(lambda image: self._nearest(self.model.latents(image)), x)

    def _nearest(self, z: Tensor) -> Tensor:
        return mark_non_finite(self.search.nearest(z.nan_to_num()), z)

    def _nearest_exactly(self, z: Tensor) -> Tensor:
        """Searches for z of several images; each result is that of the image by itself."""
        finite = z.nan_to_num()
        if isinstance(self.search, BallSearch):
            return mark_non_finite(self.search.nearest(finite, exact=True), z)
        images = torch.split(finite.double(), 1)  # because the rounding depends on the number of vectors
        return mark_non_finite(torch.cat([self.search.nearest(image) for image in images]), z)

    @torch.inference_mode()
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        z = self.model.quantize.lookup(indices.clamp(min=0))
        factor = self.model.spec.factor
        rows = self._tile_rows(factor * z.shape[2], factor * z.shape[3])
        if rows > 1:
            return self.tiles.run(self.tile_model.pictures if exact else self.tile_decoder, as_image, z, rows)
        decoder = self.model.pictures if exact else self.decoder
        return self._each(lambda latents: as_image(decoder(latents)), z)

    def _tile_rows(self, height: int, width: int) -> int:
        return tile_rows(height * width, self.model.spec.ch)

    def _each(self, compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Computes each row [1,...] by itself, because PyTorch's order of additions depends on the batch size."""
        apply = torch.inference_mode()(compute)  # inference mode is set per thread
        parts = torch.split(rows, 1)
        apply_all = map if self.threads is None or len(parts) == 1 else self.threads.map
        return torch.cat(list(apply_all(apply, parts)))


def as_image(decoded: Tensor) -> Tensor:
    """Returns decoded values in -1..1 as an image in 0..1; overwrites its argument."""
    return decoded.add_(1).div_(2).contiguous()


class FastDecoder(nn.Module):
    """A faster copy of a model's decoder.

    It runs in channels_last, computes F.silu in place, and merges each upsampling with its convolution.
    """

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        with torch.device("meta"):
            self.decoder = Decoder(model.spec)
        weights = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
        self.decoder.load_state_dict(weights, strict=True, assign=True)
        self.post_quant_conv = model.post_quant_conv
        for level in self.decoder.up:
            assert isinstance(level, Level)
            level.block = nn.ModuleList(FastBlock(block) for block in level.block)
            upsample = getattr(level, "upsample", None)
            if upsample is not None:
                level.upsample = TransposedUpsample(upsample)
        middle = self.decoder.mid
        middle.block_1, middle.block_2 = FastBlock(middle.block_1), FastBlock(middle.block_2)
        self.decoder.to(memory_format=CHANNELS_LAST)
        self.eval().requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        """Decodes z [N,d,h,w] to images [N,3,H,W] in about -1..1, as `VQGAN.pictures` does."""
        decoder = self.decoder
        h = decoder.mid(decoder.conv_in(self.post_quant_conv(z).contiguous(memory_format=CHANNELS_LAST)))
        for level in reversed(decoder.up):
            assert isinstance(level, Level)
            for step in level.steps():
                h = step(h)
        out: Tensor = decoder.conv_out(norm_silu(h, decoder.norm_out))
        return out


class FastBlock(ResnetBlock):
    """A residual block whose layers are computed in place where possible."""

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)
        for name, layer in block.named_children():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(norm_silu(self.conv1(norm_silu(x, self.norm1)), self.norm2))
        return h.add_(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Returns silu(norm(x)) of [N,C,H,W] in channels_last.

    If each group is a single channel, batch_norm over each image replaces group_norm. batch_norm makes two
    passes, the first for the mean; in this layout group_norm sums x and x² in one pass, and digits cancel. The
    error was up to a fifth of a grey level (of 255) with group_norm and is 0.01 with batch_norm. Larger groups are
    normalised in the contiguous layout.
    """
    if norm.num_groups == norm.num_channels:
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        normed = [F.batch_norm(image, None, None, weight, bias, True, 0.0, eps) for image in torch.split(x, 1)]
        out = normed[0] if len(normed) == 1 else torch.cat(normed)
    else:
        out = F.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        out = out.contiguous(memory_format=CHANNELS_LAST)
    return F.silu(out, inplace=True)


class TransposedUpsample(nn.Module):
    """Computes nearest-neighbour doubling and a 3x3 convolution as one transposed 4x4 convolution of stride 2.

    Two of any three neighbouring pixels of the doubled image are copies of the same pixel. Along each axis the taps
    w0, w1, w2 therefore become w0 and w1 + w2 at even positions, and w0 + w1 and w2 at odd positions. 9
    multiplications per pixel become 4, and the doubled image is never stored.
    """

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        weight = upsample.conv.weight.double()  # so that sums of taps are rounded once
        for axis in (2, 3):
            w0, w1, w2 = weight.unbind(axis)
            weight = torch.stack((w2, w1 + w2, w0 + w1, w0), axis)
        self.weight = nn.Parameter(weight.transpose(0, 1).float(), requires_grad=False)  # [in,out,4,4]
        self.bias = upsample.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks of up to 32 MiB for the life of the process (mallopt(3)).

    By default glibc returns free memory above about 12.8 MB to the system, and also a thread's heap of 64 MiB
    whenever that heap is empty. Every activation of 6.4 MB is then mapped and zeroed again, which costs 7,800 page
    faults for one pass of the encoder of `tiny-f8`, a sixth of its time. glibc keeps an empty heap if the padding
    (M_TOP_PAD) is larger than the heap. As a consequence every arena (a heap that threads share) stays at its
    largest size, so the number of arenas is limited to fewer than glibc's default of 8 per core.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # C libraries other than glibc may not have it
    if mallopt is not None:
        mallopt(M_ARENA_MAX, max(6, len(os.sched_getaffinity(0))))
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TOP_PAD, 64 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)
