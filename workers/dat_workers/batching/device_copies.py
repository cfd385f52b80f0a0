"""Arrays to the device, through a function, and back: one after the other, or with copies beside the computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Flight = tuple[dict[str, Tensor], torch.cuda.Event]


@dataclass(frozen=True)
class Job:
    """Arrays by name, each in parts that are joined along their first axis, and what to compute of them."""

    arrays: Mapping[str, Sequence[Array]]
    compute: Compute


def through(
    device: torch.device, jobs: Iterable[Job | None], *, overlap: bool = False
) -> Iterator[dict[str, Array]]:
    """Each job's `compute` on `device`: arrays in by name, arrays out by name, in the order of the jobs.

    >>> double = Job({"x": [np.ones(1), np.ones(1)]}, lambda given: {"y": given["x"] * 2})
    >>> [out["y"].tolist() for out in through(torch.device("cpu"), [double])]
    [[2.0, 2.0]]

    With `overlap`, which is CUDA's alone, the next job is handed over before the result of the last one is
    waited for, and copies run on streams of their own. None for a job: there is none now, give the last result.
    """
    if overlap:
        yield from _overlapped(device, jobs)
        return
    for job in jobs:
        if job is not None:
            given = {name: joined(parts, device) for name, parts in job.arrays.items()}
            made = {name: tensor.cpu().numpy() for name, tensor in job.compute(given).items()}
            del job, given  # whoever takes the result may be long in asking for the next
            yield made
            del made


def _overlapped(device: torch.device, jobs: Iterable[Job | None]) -> Iterator[dict[str, Array]]:
    """`through` with one job in flight while the next is staged.

    No buffer is reused early: device tensors that another stream reads are recorded on it, and pinned memory is
    given out again by PyTorch's allocator only when the copies that it saw are over.
    """
    up, down = side_streams(device)
    flying: Flight | None = None
    landing: Flight | None
    computing = torch.cuda.current_stream(device)
    for job in jobs:
        if job is None:
            if flying is not None:
                landing, flying = flying, None
                yield landed_arrays(*landing)
            continue
        given = {}
        with torch.cuda.stream(up):
            for name, parts in job.arrays.items():
                given[name] = pinned(parts).to(device, non_blocking=True)
        computing.wait_stream(up)
        for tensor in given.values():
            tensor.record_stream(computing)
        made = job.compute(given)
        down.wait_stream(computing)
        results = {}
        with torch.cuda.stream(down):
            for name, tensor in made.items():
                tensor.record_stream(down)
                results[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                results[name].copy_(tensor, non_blocking=True)
            landed = down.record_event()
        landing, flying = flying, (results, landed)
        del job, given, made, results
        if landing is not None:
            yield landed_arrays(*landing)
    if flying is not None:
        yield landed_arrays(*flying)


@cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams for copies to and from a device; kept, because each stream keeps memory of its own."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def joined(parts: Sequence[Array], device: torch.device) -> Tensor:
    """The parts one after the other, always a copy: they may be read-only, or views of a request about to go."""
    if len(parts) == 1:
        return torch.tensor(np.ascontiguousarray(parts[0]), device=device)
    return torch.from_numpy(np.concatenate(parts)).to(device)


def pinned(parts: Sequence[Array]) -> Tensor:
    """A copy of the parts, one after the other, in memory that the GPU reads by itself."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    staged = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, parts[0].dtype)).dtype, pin_memory=True)
    np.concatenate(parts, out=staged.numpy())
    return staged


def landed_arrays(results: dict[str, Tensor], landed: torch.cuda.Event) -> dict[str, Array]:
    """Waits for the copies of one job; arrays in ordinary memory, since pinned memory is not for keeping."""
    landed.synchronize()
    return {name: tensor.numpy().copy() for name, tensor in results.items()}
