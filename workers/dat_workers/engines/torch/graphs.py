"""CUDA graphs of one function at a few batch sizes: a few hundred kernel launches become one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 32, 64)  # images a graph takes


@dataclass
class Captured:
    """One graph with the tensors that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    result: Tensor


class Graphed:
    """`function`, replayed where a graph of its input's shape was captured, called as it is elsewhere.

    Graphs share `pool`, which is sound because they run one after the other on one stream, each reading what was
    copied into `given` before it; a `result` is kept alive, so no other graph writes there, and is copied out
    before the next replay.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], pool: Any) -> None:
        self.function = function
        self.pool = pool
        self._captured: dict[torch.Size, Captured] = {}
        self._stream: Any = None

    @torch.inference_mode()
    def capture(self, example: Tensor) -> None:
        """Captures the call for inputs of `example`'s shape and dtype; again is nothing. Largest batch first."""
        if example.shape in self._captured:
            return
        gc.collect()  # a graph of another engine that is freed during a capture would spoil it
        given = example.clone()
        if self._stream is None:  # of this device: torch.cuda.graph's own belongs to the first that captured
            self._stream = torch.cuda.Stream(given.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(given.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and cuDNN's plans made outside of the capture
                self.function(given)
        torch.cuda.current_stream(given.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            result = self.function(given)
        self._captured[example.shape] = Captured(graph, given, result)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        sizes = sorted(shape[0] for shape in self._captured if shape[1:] == x.shape[1:])
        if not sizes:
            return self.function(x)
        parts = []
        for start, count, size in pieces(len(x), sizes):
            captured = self._captured[torch.Size((size, *x.shape[1:]))]
            # rows past `count` keep what an earlier call left: no image's result depends on its neighbours
            captured.given[:count].copy_(x[start : start + count])
            captured.graph.replay()
            parts.append(captured.result[:count].clone())
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def pieces(n: int, sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(start, count, size of the graph) that together run `n` images; `sizes` ascending.

    >>> list(pieces(103, [1, 8, 32, 64]))
    [(0, 64, 64), (64, 32, 32), (96, 7, 8)]

    What is left is padded up to the next size where at most a quarter of that is padding or no size is smaller;
    else the largest size that it fills goes first.
    """
    start = 0
    while start < n:
        left = n - start
        above = next((size for size in sizes if size >= left), None)
        below = max((size for size in sizes if size <= left), default=None)
        size = above if above is not None and (below is None or above - left <= above // 4) else below
        assert size is not None
        yield start, min(left, size), size
        start += size
