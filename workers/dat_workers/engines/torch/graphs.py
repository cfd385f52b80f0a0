"""Runs a function as CUDA graphs for a few batch sizes: one launch replaces a few hundred kernel launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 32, 64)  # the batch sizes for which graphs are captured


@dataclass(frozen=True)
class CaptureMemory:
    """Holds the memory pool and the stream with which all functions of an engine are captured.

    The stream must be one and the same, because the allocator never gives a block of one stream to another: graphs
    that were captured on two streams share a pool, but no memory.
    """

    pool: Any
    stream: torch.cuda.Stream

    @classmethod
    def on(cls, device: torch.device) -> CaptureMemory:
        """Returns a new pool and a new stream on a CUDA device."""
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


@dataclass
class Captured:
    """A captured graph, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Tensor


class GraphedFunction:
    """Replays a graph of `function` if one was captured for the shape of its input, else calls the function.

    Graphs share `memory`. This is safe because they run one after the other on one stream, and the input of a graph
    is copied into place just before its replay. The output tensor of each graph is kept alive, so that no other
    graph writes to it, and is copied out before the next replay.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], memory: CaptureMemory | None) -> None:
        self.function = function
        self.memory = memory
        self._captured: dict[torch.Size, Captured] = {}

    @torch.inference_mode()
    def capture(self, example: Tensor) -> None:
        """Captures a graph for inputs of `example`'s shape and dtype, unless that graph was captured before.

        Capture the largest batch first, so that the graphs of smaller batches reuse its memory.
        """
        if example.shape in self._captured:
            return
        assert self.memory is not None
        gc.collect()  # if a graph of a different engine were freed during the capture, it would fail
        input, stream = example.clone(), self.memory.stream
        stream.wait_stream(torch.cuda.current_stream(input.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and cuDNN plans here, outside of the capture
                self.function(input)
        torch.cuda.current_stream(input.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory.pool, stream=stream, capture_error_mode="thread_local"):
            output = self.function(input)
        self._captured[example.shape] = Captured(graph, input, output)

    def forget(self, shape: torch.Size) -> None:
        """Drops the graph for inputs of this shape, if there is one."""
        self._captured.pop(shape, None)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        sizes = sorted(shape[0] for shape in self._captured if shape[1:] == x.shape[1:])
        if not sizes:
            return self.function(x)
        parts = []
        for start, count, size in split_for_graphs(len(x), sizes):
            captured = self._captured[torch.Size((size, *x.shape[1:]))]
            # Rows beyond `count` hold values of an earlier call. They do no harm, because the result of an image
            # does not depend on the other rows.
            captured.input[:count].copy_(x[start : start + count])
            captured.graph.replay()
            parts.append(captured.output[:count].clone())
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_for_graphs(n: int, sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """Splits `n` images into graph calls: yields (start, count, size of the graph); `sizes` must be ascending.

    >>> list(split_for_graphs(103, [1, 8, 32, 64]))
    [(0, 64, 64), (64, 32, 32), (96, 7, 8)]

    The remaining images are padded up to the next larger size if at most a quarter of that size is padding, or if
    they are fewer than the smallest size. Otherwise the largest size that they fill comes next.
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
