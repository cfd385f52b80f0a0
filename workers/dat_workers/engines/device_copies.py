"""Runs batches on a device: arrays to the device, a function there, arrays back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dat_client.wire.tensors import Array

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class DeviceBatch:
    """Arrays by name, each in parts that are joined along their first axis, and what to compute from them."""

    arrays: Mapping[str, Sequence[Array]]
    compute: Compute


@dataclass(frozen=True)
class Copies:
    """Results in pinned memory, complete once `done` has happened."""

    results: dict[str, Tensor]
    done: torch.cuda.Event

    def wait(self) -> dict[str, Array]:
        """Waits for the copies and returns them in ordinary memory, since pinned memory is scarce."""
        self.done.synchronize()
        return {name: tensor.numpy().copy() for name, tensor in self.results.items()}


def run_on_device(
    device: torch.device, batches: Iterable[DeviceBatch | None], *, overlap: bool = False
) -> Iterator[dict[str, Array]]:
    """Yields the results of each batch's `compute` on `device`, arrays by name, in the order of the batches.

    >>> double = DeviceBatch({"x": [np.ones(1), np.ones(1)]}, lambda inputs: {"y": inputs["x"] * 2})
    >>> [results["y"].tolist() for results in run_on_device(torch.device("cpu"), [double])]
    [[2.0, 2.0]]

    With `overlap`, which exists on CUDA alone, the next batch is handed over before the results of the last one are
    waited for, and copies run on streams of their own. None in place of a batch means that none is ready yet: the
    outstanding results are yielded without waiting for one.
    """
    if overlap:
        yield from _run_overlapped(device, batches)
        return
    for batch in batches:
        if batch is not None:
            inputs = {name: joined(parts, device) for name, parts in batch.arrays.items()}
            results = {name: tensor.cpu().numpy() for name, tensor in batch.compute(inputs).items()}
            del batch, inputs  # the consumer may take long before it asks for the next results
            yield results
            del results


def _run_overlapped(device: torch.device, batches: Iterable[DeviceBatch | None]) -> Iterator[dict[str, Array]]:
    """Runs batches with one of them on the device while the next is staged.

    No buffer is reused early: device tensors that another stream reads are recorded on it, and PyTorch's allocator
    hands pinned memory out again only when the copies that it saw are over.
    """
    upload, download = copy_streams(device)
    outstanding: Copies | None = None
    computing = torch.cuda.current_stream(device)
    for batch in batches:
        previous, outstanding = outstanding, None
        if batch is not None:
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
            with torch.cuda.stream(download):
                for name, tensor in tensors.items():
                    tensor.record_stream(download)
                    results[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    results[name].copy_(tensor, non_blocking=True)
                outstanding = Copies(results, download.record_event())
            del batch, inputs, tensors, results
        if previous is not None:
            yield previous.wait()
    if outstanding is not None:
        yield outstanding.wait()


@cache
def copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Returns the streams for copies to and from a device; cached, because each stream holds memory of its own."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def joined(parts: Sequence[Array], device: torch.device) -> Tensor:
    """Joins the parts into a tensor. Always copies: parts may be read-only, or views of a request about to go."""
    if len(parts) == 1:
        return torch.tensor(np.ascontiguousarray(parts[0]), device=device)
    return torch.from_numpy(np.concatenate(parts)).to(device)


def pinned(parts: Sequence[Array]) -> Tensor:
    """Joins copies of the parts in pinned memory, which the GPU reads by itself."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    staged = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, parts[0].dtype)).dtype, pin_memory=True)
    np.concatenate(parts, out=staged.numpy())
    return staged
