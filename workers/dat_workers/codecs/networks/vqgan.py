"""The VQGAN of "Taming Transformers" (Esser et al., 2021) and of latent-diffusion's first stages.

Parameters have the names of the published checkpoints (`encoder.down.0.block.0.norm1.weight`, ...,
`quantize.embedding.weight`), so that a published state dict loads strictly. The modules are plain fp32 PyTorch; the
engines make them fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_workers.codecs.spec import CodecSpec

# Attention over more positions than this is computed in blocks: the whole matrix of a 2048 x 2048 image at f = 8
# would take 17 GB. Up to this limit the published formula is computed to the last bit.
LARGE_ATTENTION = 4096


def swish(x: Tensor) -> Tensor:
    """Returns x·sigmoid(x), rounded twice as in the published code.

    F.silu rounds once and differs in the last bit, which changes tokens (4 in 10,000 of `tiny-f8`).
    """
    return x * torch.sigmoid(x)


class Norm(nn.GroupNorm):
    """GroupNorm with the published settings: 32 groups, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups=32, num_channels=channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last PyTorch's CPU kernel sums x and x² at once, so digits cancel where the mean is large:
        # with mean/deviation of 300 it was off by 0.5. On contiguous input, as published, it was off by 4e-5.
        return super().forward(x.contiguous())


class NormSwish(Norm):
    """Computes swish(norm(x)) in one module, so that an engine can replace it by one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return swish(super().forward(x))


class ResnetBlock(nn.Module):
    """Computes x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x if the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = NormSwish(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSwish(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(self.norm1(x))
        h = self.norm2(h)  # on a line of its own, so that conv1's output is freed before conv2 runs
        h = self.conv2(h)
        shortcut: Tensor = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h


class AttnBlock(nn.Module):
    """Applies single-head self-attention over all positions, and adds its input (residual connection)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        projected: Tensor = self.proj_out(self.attend(q, k, v).reshape(x.shape))
        return x + projected

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the mean of the values v, weighted by the softmax of q·k; all are [N,C,positions]."""
        _, channels, positions = q.shape
        if positions > LARGE_ATTENTION:
            q, k, v = (t.transpose(1, 2).contiguous()[:, None] for t in (q, k, v))  # fused kernels need this layout
            return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        weights = torch.bmm(q.transpose(1, 2), k).mul(channels**-0.5).softmax(2)
        return torch.bmm(v, weights.transpose(1, 2))


class Downsample(nn.Module):
    """Halves the side: pads with zeros on the right and below, then convolves with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the side: repeats the nearest pixel, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The blocks that work at one resolution, followed by `downsample`, `upsample` or neither."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(channels[i], channels[i + 1]) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))

    def steps(self) -> Iterator[nn.Module]:
        """Yields the modules in the order in which they run.

        Encoder and decoder call them one by one. A `forward` of the level would keep the level's input alive until
        its last block has run, a sixth of the decoder's memory.
        """
        for i, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[i]
        for step in ("downsample", "upsample"):
            if hasattr(self, step):
                yield getattr(self, step)


class Middle(nn.Module):
    """A residual block, attention and a second residual block, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(h)))
        return out


class Encoder(nn.Module):
    """Maps images [N,3,H,W] in -1..1 to features [N,z_channels,H/f,W/f]."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        widths = spec.widths
        self.conv_in = nn.Conv2d(3, spec.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            narrower = widths[i - 1] if i else spec.ch
            level = Level(narrower, width, spec.num_res_blocks, i in spec.attention_levels)
            if i + 1 < len(widths):
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = NormSwish(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, Level)
            for step in level.steps():
                h = step(h)
        out: Tensor = self.conv_out(self.norm_out(self.mid(h)))
        return out


class Decoder(nn.Module):
    """Maps features [N,z_channels,h,w] to images [N,3,h*f,w*f] with values in about -1..1, not clipped."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        widths = spec.widths
        top = len(widths) - 1
        self.conv_in = nn.Conv2d(spec.z_channels, widths[top], 3, padding=1)
        self.mid = Middle(widths[top])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            wider = widths[min(i + 1, top)]
            level = Level(wider, width, spec.num_res_blocks + 1, i in spec.attention_levels)
            if i:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = NormSwish(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, Level)
            for step in level.steps():
                h = step(h)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out


class Codebook(nn.Module):
    """The codebook: K vectors of size d, named `quantize.embedding` in the published checkpoints."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def nearest(self, z: Tensor) -> Tensor:
        """Returns the index of the codebook vector nearest to each latent vector (Eq. 3).

        z [N,d,h,w] gives int64 [N,h,w]. Distances are fp32, or fp64 if z is. They are computed for one block of
        latent vectors at a time, because all distances of an image of 224² at K = 16384 take 51 MB. A block of 4 M
        distances stays in a CPU's cache, which makes the search twice as fast.
        """
        n, d, height, width = z.shape
        flat = (z if z.dtype == torch.float64 else z.float()).permute(0, 2, 3, 1).reshape(-1, d)
        vectors = self.embedding.weight.to(flat.dtype)
        norms = vectors.square().sum(1)
        chunk = max(16, (1 << (27 if z.is_cuda else 22)) // len(vectors))
        # |z|² is the same for every codebook vector and could be left out. It is included, in the published order
        # of additions, so that rounding equals the published quantizer's: with K = 16384 and d = 4 one token in a
        # thousand is nearer to a tie than fp32 can resolve, and there equal rounding gives equal tokens (observed
        # on CPUs). MKL rounds a product of a few rows differently, so no block is much shorter than the others.
        parts = [
            torch.addmm(rows.square().sum(1, keepdim=True) + norms, rows, vectors.t(), alpha=-2.0).argmin(1)
            for rows in torch.tensor_split(flat, -(-len(flat) // chunk))
        ]
        return torch.cat(parts).view(n, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        """Returns the codebook vectors [N,d,h,w] of indices [N,h,w]."""
        vectors: Tensor = self.embedding(indices)
        return vectors.permute(0, 3, 1, 2).contiguous()


class VQGAN(nn.Module):
    """A network of encoder, codebook and decoder, with Q(x) = decode(encode(x)) (Eq. 3-4)."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quantize = Codebook(spec.codebook_size, spec.latent_dim)
        self.quant_conv = nn.Conv2d(spec.z_channels, spec.latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(spec.latent_dim, spec.z_channels, 1)

    def latents(self, x: Tensor) -> Tensor:
        """Returns the latent vectors [N,d,h,w] of images [N,3,H,W] in -1..1, before the codebook search."""
        out: Tensor = self.quant_conv(self.encoder(x))
        return out

    def pictures(self, z: Tensor) -> Tensor:
        """Returns the images [N,3,H,W], in about -1..1, of latent vectors [N,d,h,w]."""
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out

    def encode(self, x: Tensor) -> Tensor:
        """Returns the indices int64 [N,h,w] of images [N,3,H,W] in -1..1."""
        return self.quantize.nearest(self.latents(x))

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the images [N,3,H,W], in about -1..1, of indices [N,h,w]."""
        return self.pictures(self.quantize.lookup(indices))
