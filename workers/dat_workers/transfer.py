"""Arrays to the device, through a function, and back: one after the other, or with copies beside the computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def through(
    device: torch.device, jobs: Iterable[Mapping[str, Array]], compute: Compute, *, overlap: bool = False
) -> Iterator[dict[str, Array]]:
    """`compute` of each job on `device`: arrays in by name, arrays out by name, in the order of the jobs.

    >>> double = lambda job: {"y": job["x"] * 2}
    >>> [out["y"].tolist() for out in through(torch.device("cpu"), [{"x": np.ones(2)}], double)]
    [[2.0, 2.0]]

    With `overlap`, which is CUDA's alone, the next job is handed over before the result of the last one is
    waited for, and copies run on streams of their own.
    """
    if overlap:
        yield from _overlapped(device, jobs, compute)
        return
    for job in jobs:
        # torch.tensor copies: an array may be read-only, or a view of a request that is about to go
        given = {name: torch.tensor(np.ascontiguousarray(array), device=device) for name, array in job.items()}
        yield {name: tensor.cpu().numpy() for name, tensor in compute(given).items()}


def _overlapped(
    device: torch.device, jobs: Iterable[Mapping[str, Array]], compute: Compute
) -> Iterator[dict[str, Array]]:
    """`through` with one job in flight while the next is staged.

    No buffer is reused early: device tensors that another stream reads are recorded on it, and pinned memory is
    given out again by PyTorch's allocator only when the copies that it saw are over.
    """
    up, down = side_streams(device)
    flying: tuple[dict[str, Tensor], torch.cuda.Event] | None = None
    computing = torch.cuda.current_stream(device)
    for job in jobs:
        given = {}
        with torch.cuda.stream(up):
            for name, array in job.items():
                given[name] = pinned(array).to(device, non_blocking=True)
        computing.wait_stream(up)
        for tensor in given.values():
            tensor.record_stream(computing)
        made = compute(given)
        down.wait_stream(computing)
        results = {}
        with torch.cuda.stream(down):
            for name, tensor in made.items():
                tensor.record_stream(down)
                results[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                results[name].copy_(tensor, non_blocking=True)
            landed = down.record_event()
        if flying is not None:
            yield landed_arrays(*flying)
        flying = results, landed
    if flying is not None:
        yield landed_arrays(*flying)


@cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams for copies to and from a device; kept, because each stream keeps memory of its own."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def pinned(array: Array) -> Tensor:
    """A copy in memory that the GPU reads by itself."""
    staged = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=True)
    np.copyto(staged.numpy(), array)
    return staged


def landed_arrays(results: dict[str, Tensor], landed: torch.cuda.Event) -> dict[str, Array]:
    """Waits for the copies of one job; arrays in ordinary memory, since pinned memory is not for keeping."""
    landed.synchronize()
    return {name: tensor.numpy().copy() for name, tensor in results.items()}
