"""Runs batches on a device: copies arrays to the device, calls a function there, and copies the results back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dat_client.wire.tensors import Array

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class DeviceBatch:
    """The inputs of a batch by name, each as parts to join along the first axis, and the function to call."""

    arrays: Mapping[str, Sequence[Array]]
    compute: Compute


@dataclass(frozen=True)
class Copies:
    """Results in pinned memory, which are complete once the event `done` has happened."""

    results: dict[str, Tensor]
    done: Any  # torch.cuda.Event

    def wait(self) -> dict[str, Array]:
        """Waits for the copies and returns the results in ordinary memory, because pinned memory is scarce."""
        self.done.synchronize()
        return {name: tensor.numpy().copy() for name, tensor in self.results.items()}


def run_on_device(
    device: torch.device, batches: Iterable[DeviceBatch | None], *, overlap: bool = False
) -> Iterator[dict[str, Array]]:
    """Runs each batch's `compute` on `device` and yields its results, arrays by name, in the order of the batches.

    >>> double = DeviceBatch({"x": [np.ones(1), np.ones(1)]}, lambda inputs: {"y": inputs["x"] * 2})
    >>> [results["y"].tolist() for results in run_on_device(torch.device("cpu"), [double])]
    [[2.0, 2.0]]

    With `overlap`, which is possible only on CUDA, a batch is started before the results of the previous batch are
    waited for, and copies run on separate streams. None in place of a batch means that no batch is ready yet; the
    results of the batch in flight are then yielded without waiting for the next batch.
    """
    if overlap:
        yield from _run_overlapped(device, batches)
        return
    for batch in batches:
        if batch is not None:
            inputs = {name: joined(parts, device) for name, parts in batch.arrays.items()}
            results = {name: tensor.cpu().numpy() for name, tensor in batch.compute(inputs).items()}
            del batch, inputs  # hold no memory while the consumer works on the results
            yield results
            del results


def _run_overlapped(device: torch.device, batches: Iterable[DeviceBatch | None]) -> Iterator[dict[str, Array]]:
    """Yields results as `run_on_device` does, but copies the next batch while the device computes the current one.

    The consumer's current device stays as it is while it works on the results.
    """
    outstanding: Copies | None = None
    for batch in batches:
        previous, outstanding = outstanding, None
        if batch is not None:
            with torch.cuda.device(device):  # pinned memory would open a context on the current device
                outstanding = _start(device, batch)
            del batch
        if previous is not None:
            yield previous.wait()
    if outstanding is not None:
        yield outstanding.wait()


def _start(device: torch.device, batch: DeviceBatch) -> Copies:
    """Starts the copies and the computation of a batch; `device` must be the current device.

    No buffer is reused too early: a device tensor that a second stream reads is recorded on that stream, and
    PyTorch's allocator reuses pinned memory only after the copies from or to it have finished.
    """
    upload, download = copy_streams(device)
    computing = torch.cuda.current_stream(device)
    inputs = {}
    with torch.cuda.stream(upload):
        for name, parts in batch.arrays.items():
            inputs[name] = pinned(parts).to(device, non_blocking=True)
    computing.wait_stream(upload)
    for tensor in inputs.values():
        tensor.record_stream(computing)
    tensors = batch.compute(inputs)
    download.wait_stream(computing)
    results = {}
    done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # by default, waiting spins
    with torch.cuda.stream(download):
        for name, tensor in tensors.items():
            tensor.record_stream(download)
            results[name] = pinned_empty(tensor.shape, tensor.dtype)
            results[name].copy_(tensor, non_blocking=True)
        done.record(download)
    return Copies(results, done)


@cache
def copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Returns the streams for copies to and from a device; they are cached because each stream reserves memory."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def joined(parts: Sequence[Array], device: torch.device) -> Tensor:
    """Joins copies of the parts: a part may be read-only, or a view of a request whose memory is freed soon."""
    if len(parts) == 1:
        return torch.tensor(np.ascontiguousarray(parts[0]), device=device)
    return torch.from_numpy(np.concatenate(parts)).to(device)


def pinned(parts: Sequence[Array]) -> Tensor:
    """Joins copies of the parts in pinned memory, which the GPU can read without the CPU's help."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    staged = pinned_empty(shape, torch.from_numpy(np.empty(0, parts[0].dtype)).dtype)
    np.concatenate(parts, out=staged.numpy())
    return staged


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised tensor in pinned memory."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
