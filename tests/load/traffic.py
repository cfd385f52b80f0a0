"""Clients that send requests without pause, compare every answer and count: the basis of the tests under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from benchmarks.latency import percentiles
from dat_client import Client
from tests.load.answers import CODEC, Answers, kind_of


@dataclass
class Record:
    """The calls of one client: seconds of the answered ones, attempts behind all of them, and the errors."""

    seconds: list[float] = field(default_factory=list)
    images: int = 0
    attempts: int = 0
    errors: list[str] = field(default_factory=list)


class Traffic:
    """Clients in threads of this process, each in a closed loop with its own requests, until the block ends.

    >>> with Traffic([url] * 8, compute_answers()) as traffic:     # doctest: +SKIP
    ...     time.sleep(60)
    >>> traffic.figures()["errors"]                                 # doctest: +SKIP
    []
    """

    def __init__(
        self,
        urls: Sequence[str],
        answers: Answers,
        *,
        kinds: Sequence[str] = ("plain", "gradients"),
        most: int = 8,
        timeout_s: float = 60.0,
    ) -> None:
        self.records = [Record() for _ in urls]
        self._answers, self._kinds, self._most, self._timeout_s = answers, kinds, most, timeout_s
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(i, url)) for i, url in enumerate(urls)]

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()  # calls under way are waited for, so that an answer that never comes would show
        for thread in self._threads:
            thread.join()
        self.ended = time.monotonic()

    def _send(self, i: int, url: str) -> None:
        record = self.records[i]
        with Client(url, CODEC, timeout_s=self._timeout_s) as client:
            count_attempts(client, record)
            number = 0
            while not self._end.is_set():
                rows = self._answers.rows(i, number, self._most)
                began = time.monotonic()
                try:
                    self._answers.check(client, rows, kind_of(number + i, self._kinds))
                except Exception as error:
                    record.errors.append(f"client {i}, request {number}: {type(error).__name__}: {error}")
                else:
                    record.seconds.append(time.monotonic() - began)
                    record.images += len(rows)
                number += 1

    @property
    def answered(self) -> int:
        """The number of calls with the right answer so far."""
        return sum(len(record.seconds) for record in self.records)

    def figures(self) -> dict[str, Any]:
        """Returns calls, images, repeated attempts, percentiles of the call times and errors of all clients."""
        seconds = [s for record in self.records for s in record.seconds]
        errors = [error for record in self.records for error in record.errors]
        calls = len(seconds) + len(errors)
        return {
            "clients": len(self.records),
            "calls": calls,
            "images": sum(record.images for record in self.records),
            "repeated by the client": sum(record.attempts for record in self.records) - calls,
            **(percentiles(seconds) if seconds else {}),
            "errors": errors,
        }


def count_attempts(client: Client, record: Record) -> None:
    """Counts what the client sends, answered or not: every call is one attempt or more."""
    prepare = client._transport.prepare

    def counting(call: Any) -> Any:
        attempt = prepare(call)

        def counted(deadline: float, number: int) -> Any:
            record.attempts += 1
            return attempt(deadline, number)

        return counted

    client._transport.prepare = counting  # type: ignore[method-assign]


def show(title: str, figures: dict[str, Any]) -> None:
    """Prints one figure a line, and the first ten of a list."""
    print(f"\n{title}")
    for name, value in figures.items():
        if isinstance(value, list):
            print(f"  {name}: {len(value)}", *(f"\n    {line}" for line in value[:10]), sep="")
        else:
            print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}", flush=True)
