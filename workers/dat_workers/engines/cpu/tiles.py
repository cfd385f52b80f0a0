"""Computes small pictures several at a time, so that each result is bit-equal to that of the picture by itself.

At 32 x 32 pixels a layer of `tiny-f8` takes less time than starting it, reordering its weights and waiting for
another thread. So the pictures of a batch are divided into tiles, and one thread computes each tile as one batch of
the network. Three things would make a picture's last bits depend on its company, and are changed:

- PyTorch computes a convolution of one small picture by another library than a convolution of several (in
  `ConvParams::use_mkldnn`), and that library adds in another order: here it is always oneDNN (`TileConv`).
- MKL chooses how to multiply two matrices by their addresses, too: attention is computed for one picture at a time
  (`TileAttention`), and so is the codebook's formula (`ball_search.py`).
- A layer that several threads divide among each other is cut in the middle of a picture: here it has one thread.

oneDNN does not promise that it adds in the same order for any number of pictures. It did so in every measured case,
and `Tiles` compares it for each size of picture before it relies on it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from dat_workers.codecs.networks.vqgan import AttnBlock
from dat_workers.system.threads import DaemonThreads

# For a network with 32 channels; at more channels a picture takes longer, but starting its layers does not.
SMALL_PIXELS = 128 * 64  # largest picture that shares a tile; a larger one is as fast by itself
TILE_PIXELS = 256 * 128  # of a tile; in smaller tiles a pixel takes longer
MOST_TILE_ROWS = 32
MOST_CHECKED_SIZES = 64  # sizes of pictures beyond these are computed one picture at a time

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

Network: TypeAlias = Callable[[Tensor], Tensor]
M = TypeVar("M", bound=nn.Module)


def tile_rows(pixels: int, channels: int) -> int:
    """Returns how many pictures of `pixels` pixels make a full tile, a power of two; 1 if they are not small.

    `channels` is the number of channels at full resolution (`CodecSpec.ch`); time grows with its square.
    """
    size = pixels * (channels / 32) ** 2
    return power_of_two(min(MOST_TILE_ROWS, int(TILE_PIXELS / size))) if size <= SMALL_PIXELS else 1


def tile_sizes(rows: int, most: int, threads: int) -> list[int]:
    """Divides `rows` pictures into tiles for `threads` threads: powers of two up to `most`, the largest first.

    >>> tile_sizes(23, most=16, threads=2)
    [8, 8, 4, 2, 1]
    """
    sizes: list[int] = []
    size = min(most, power_of_two(max(1, rows // threads)))
    while rows:
        size = min(size, power_of_two(rows))
        sizes.append(size)
        rows -= size
    return sizes


def power_of_two(number: int) -> int:
    """Returns the largest power of two that is not above `number`, which is 1 or more."""
    return 1 << (number.bit_length() - 1)


class Tiles:
    """Computes networks on small pictures, in as many threads as PyTorch has; each thread has a tile of its own.

    >>> Tiles().run(latents, images, most=16).shape  # doctest: +SKIP
    torch.Size([23, 4, 4, 4])
    """

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._threads = single_core_threads(self.count)
        self._most: dict[tuple[Network, tuple[int, ...]], int] = {}

    def run(self, network: Network, finish: Network, rows: Tensor, most: int) -> Tensor:
        """Returns `finish(network(rows))` of pictures or latent vectors [N,C,H,W], in tiles of up to `most` rows.

        `prepare` checks that the result of `network` does not depend on a picture's company. That of `finish` must
        not.
        """
        if len(rows) >= 2 * self.count:
            most = self.prepare(network, tuple(rows.shape[1:]), most)
        tiles = torch.split(rows, tile_sizes(len(rows), most, self.count))
        return torch.cat(self._map(lambda tile: finish(network(tile)), tiles))

    def prepare(self, network: Network, shape: tuple[int, ...], most: int) -> int:
        """Returns how many rows of `shape` [C,H,W] the network may compute together: `most`, or else 1.

        The first call for a size compares all sizes of tiles, on noise, with the same pictures by themselves.
        """
        key = (network, shape)
        if key not in self._most:
            if len(self._most) >= MOST_CHECKED_SIZES:
                return 1
            noise = torch.randn(most, *shape, generator=torch.Generator().manual_seed(0))
            sizes = [1 << i for i in range(1, most.bit_length())]
            results = self._map(network, [*(noise[:size] for size in sizes), *torch.split(noise, 1)])
            alone = torch.cat(results[len(sizes) :])
            equal = all(torch.equal(tile, alone[: len(tile)]) for tile in results[: len(sizes)])
            self._most[key] = most if equal else 1
        return self._most[key]

    def _map(self, compute: Network, tiles: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
        return self._threads.map(torch.inference_mode()(compute), tiles)  # inference mode is set per thread


def single_core_threads(count: int) -> DaemonThreads:
    """Starts `count` threads in each of which PyTorch computes with one core, whatever the process has."""
    threads, all_started = DaemonThreads(count, "codec-tile"), threading.Barrier(count)

    def use_one_core(_: int) -> None:
        all_started.wait()  # so that no thread takes two of these tasks
        torch.get_num_threads()  # the first call in a thread takes over the process's number
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    threads.map(use_one_core, range(count))
    torch.set_num_threads(before)  # because the last number also holds for all threads that start later
    return threads


def for_tiles(network: M) -> M:
    """Returns a copy of a network for tiles of several pictures; it has the same tensors as its parameters."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    for module in copied.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = TileConv
        elif type(module) is AttnBlock:
            module.__class__ = TileAttention
    return copied


class TileConv(nn.Conv2d):
    """A convolution that oneDNN computes, if PyTorch has it, for any number of pictures."""

    def forward(self, x: Tensor) -> Tensor:
        if not HAS_ONEDNN:
            return super().forward(x)
        padding, stride, dilation = self.padding, self.stride, self.dilation
        assert not isinstance(padding, str)
        return torch.mkldnn_convolution(x, self.weight, self.bias, padding, stride, dilation, self.groups)


class TileAttention(AttnBlock):
    """Self-attention that multiplies the matrices of each picture by themselves."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = super().attend
        return torch.cat(
            [attend(*picture) for picture in zip(*(torch.split(t, 1) for t in (q, k, v)), strict=True)]
        )
