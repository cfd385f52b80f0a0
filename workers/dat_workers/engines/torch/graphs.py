"""Runs a function as CUDA graphs of a few batch sizes, so that a few hundred kernel launches become one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 32, 64)  # images per graph


@dataclass
class Captured:
    """A graph with the tensors that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Tensor


class GraphedFunction:
    """Replays a graph of `function` if one was captured for the shape of its input, else calls the function.

    Graphs share the memory of `pool`. That is safe because they run one after the other on one stream, and the
    input of each is copied into place just before it. Its output tensor is kept alive, so that no other graph
    writes there, and is copied out before the next replay.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], pool: Any) -> None:
        self.function = function
        self.pool = pool
        self._captured: dict[torch.Size, Captured] = {}
        self._stream: Any = None

    @torch.inference_mode()
    def capture(self, example: Tensor) -> None:
        """Captures a graph for inputs of `example`'s shape and dtype, unless there is one.

        Capture the largest batch first, since the others fit into its memory.
        """
        if example.shape in self._captured:
            return
        gc.collect()  # a graph of another engine that is freed during a capture would spoil it
        input = example.clone()
        if self._stream is None:  # torch.cuda.graph's default stream belongs to the device that captured first
            self._stream = torch.cuda.Stream(input.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(input.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and lets cuDNN plan, which must happen outside of the capture
                self.function(input)
        torch.cuda.current_stream(input.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            output = self.function(input)
        self._captured[example.shape] = Captured(graph, input, output)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        sizes = sorted(shape[0] for shape in self._captured if shape[1:] == x.shape[1:])
        if not sizes:
            return self.function(x)
        parts = []
        for start, count, size in split_for_graphs(len(x), sizes):
            captured = self._captured[torch.Size((size, *x.shape[1:]))]
            # Rows beyond `count` keep the values of an earlier call: no image's result depends on its neighbours.
            captured.input[:count].copy_(x[start : start + count])
            captured.graph.replay()
            parts.append(captured.output[:count].clone())
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_for_graphs(n: int, sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yields (start, count, size of the graph) that together run `n` images; `sizes` must be ascending.

    >>> list(split_for_graphs(103, [1, 8, 32, 64]))
    [(0, 64, 64), (64, 32, 32), (96, 7, 8)]

    The images that are left are padded up to the next size if at most a quarter of that is padding, or if no size
    is smaller; otherwise the largest size that they fill goes first.
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
