"""Requests in the codec's queue, and the parts of them that batches consist of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from dat_client.wire.tensors import Array
from dat_workers.batching.fair_queue import QueuedItem
from dat_workers.engines.device_copies import Compute, DeviceBatch
from dat_workers.request import CodecRequest, Task


@dataclass(frozen=True)
class Result:
    """The outputs of a request by name, the seconds it waited in the queue, and the seconds it was computed."""

    outputs: dict[str, Array]
    queue_s: float = 0.0
    codec_s: float = 0.0


@dataclass(eq=False)
class QueuedRequest(QueuedItem):
    """A request between its submission and its result. Times are those of time.monotonic()."""

    request: CodecRequest
    deadline: float | None
    future: Future[Result] = field(default_factory=Future)
    started: float = 0.0  # when its first row was taken into a batch
    outputs: dict[str, Array] = field(default_factory=dict)
    delivered: int = 0  # rows whose outputs have arrived

    def deliver(self, outputs: dict[str, Array], start: int, owned: bool) -> None:
        """Stores the outputs of rows from `start` on; completes the future when the outputs of all rows are stored.

        `owned` means that the arrays hold no rows of other requests, so that they may become the result uncopied.
        """
        count, rows = len(next(iter(outputs.values()))), self.request.rows
        if count == rows and owned:
            self.outputs = outputs
        else:
            for name, array in outputs.items():
                if name not in self.outputs:
                    self.outputs[name] = np.empty((rows, *array.shape[1:]), array.dtype)
                self.outputs[name][start : start + count] = array
        self.delivered += count
        if self.delivered == rows:
            now = time.monotonic()
            resolve(self.future, Result(self.outputs, self.started - self.arrived, now - self.started))


@dataclass(frozen=True)
class Part:
    """`count` rows of a queued request, from row `start` on."""

    queued: QueuedRequest
    start: int
    count: int

    def arrays(self) -> dict[str, Array]:
        """Returns this part's rows of each of the request's arrays."""
        return {name: a[self.start : self.start + self.count] for name, a in self.queued.request.arrays.items()}


@dataclass(eq=False)
class Batch:
    """Parts of requests of one task, computed together."""

    parts: list[Part]
    capacity: int
    started: float

    @property
    def task(self) -> Task:
        return self.parts[0].queued.request.task

    @property
    def rows(self) -> int:
        return row_count(self.parts)

    @property
    def cost(self) -> float:
        return self.rows * self.task.cost


def row_count(parts: Sequence[Part]) -> int:
    """Returns the number of rows in all parts together."""
    return sum(part.count for part in parts)


def device_batch(parts: Sequence[Part], compute: Compute, padded_rows: int = 0) -> DeviceBatch:
    """Joins parts of one task; if they have fewer than `padded_rows` rows, repeats the first row to reach them."""
    arrays = [part.arrays() for part in parts]
    first_row = {name: array[:1] for name, array in arrays[0].items()}
    arrays += [first_row] * (padded_rows - row_count(parts))
    return DeviceBatch({name: [a[name] for a in arrays] for name in arrays[0]}, compute)


def resolve(future: Future[Result], outcome: Result | Exception) -> None:
    """Completes a future with a result or an exception, unless it is already cancelled or completed."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
