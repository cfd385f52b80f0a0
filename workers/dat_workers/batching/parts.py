"""Requests in the codec's queue, and the pieces of them that batches are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from dat_workers.batching.device_copies import Array, Compute, Job
from dat_workers.request import Work


@dataclass(frozen=True)
class Result:
    """Outputs by name, rows in the order of the request; seconds before its first row was computed, and after."""

    outputs: dict[str, Array]
    queue_s: float = 0.0
    codec_s: float = 0.0


@dataclass(eq=False)
class Request:
    """One work on its way through the batches."""

    work: Work
    deadline: float | None
    arrived: float
    future: Future[Result] = field(default_factory=Future)
    taken: int = 0
    started: float = 0.0
    outputs: dict[str, Array] = field(default_factory=dict)
    left: int = 0

    def put(self, rows: dict[str, Array], start: int, alone: bool) -> None:
        """Keeps the outputs of rows from `start` on; `alone`: the arrays hold nothing of other requests."""
        count = len(next(iter(rows.values())))
        if count == self.work.rows and alone:
            self.outputs = rows
        else:
            for name, array in rows.items():
                whole = self.outputs.get(name)
                if whole is None:
                    whole = self.outputs[name] = np.empty((self.work.rows, *array.shape[1:]), array.dtype)
                whole[start : start + count] = array
        self.left -= count
        if not self.left:
            now = time.monotonic()
            settle(self.future, Result(self.outputs, self.started - self.arrived, now - self.started))


@dataclass(frozen=True)
class Piece:
    """`count` rows of a request from `start` on."""

    request: Request
    start: int
    count: int

    def arrays(self) -> dict[str, Array]:
        return {name: a[self.start : self.start + self.count] for name, a in self.request.work.arrays.items()}


@dataclass(eq=False)
class Batch:
    """Pieces that are computed together."""

    pieces: list[Piece]
    capacity: int
    started: float

    @property
    def rows(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def cost(self) -> float:
        return self.rows * self.pieces[0].request.work.task.cost


def joint(pieces: Sequence[Piece], compute: Compute, rows: int = 0) -> Job:
    """The rows of pieces of one task as one job; its first row again and again, until there are `rows`."""
    arrays = [piece.arrays() for piece in pieces]
    first = {name: array[:1] for name, array in arrays[0].items()}
    arrays += [first] * (rows - sum(piece.count for piece in pieces))
    return Job({name: [a[name] for a in arrays] for name in arrays[0]}, compute)


def settle(future: Future[Result], outcome: Result | Exception) -> None:
    """Gives a future its end, unless it was cancelled meanwhile."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
