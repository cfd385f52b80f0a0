"""Clients that ask without pause, compare every answer and count: what the tests under load stand on."""

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
class Seen:
    """What one client has seen: seconds of its answered calls, the attempts behind them, and what went wrong."""

    seconds: list[float] = field(default_factory=list)
    images: int = 0
    attempts: int = 0
    errors: list[str] = field(default_factory=list)


class Traffic:
    """Clients in threads of this process, each in a closed loop with requests of its own, until the block ends.

    >>> with Traffic([url] * 8, answers()) as traffic:     # doctest: +SKIP
    ...     time.sleep(60)
    >>> traffic.figures()["errors"]                         # doctest: +SKIP
    []
    """

    def __init__(
        self,
        urls: Sequence[str],
        right: Answers,
        *,
        kinds: Sequence[str] = ("plain", "gradients"),
        most: int = 8,
        timeout_s: float = 60.0,
    ) -> None:
        self.seen = [Seen() for _ in urls]
        self._right, self._kinds, self._most, self._timeout_s = right, kinds, most, timeout_s
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i, url)) for i, url in enumerate(urls)]

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()  # what is under way is waited for: an answer that never comes would show
        for thread in self._threads:
            thread.join()
        self.ended = time.monotonic()

    def _ask(self, i: int, url: str) -> None:
        seen = self.seen[i]
        with Client(url, CODEC, timeout_s=self._timeout_s) as client:
            count_attempts(client, seen)
            number = 0
            while not self._end.is_set():
                rows = self._right.rows(i, number, self._most)
                began = time.monotonic()
                try:
                    self._right.ask(client, rows, kind_of(number + i, self._kinds))
                except Exception as error:
                    seen.errors.append(f"client {i}, request {number}: {type(error).__name__}: {error}")
                else:
                    seen.seconds.append(time.monotonic() - began)
                    seen.images += len(rows)
                number += 1

    @property
    def answered(self) -> int:
        """Calls with the right answer so far."""
        return sum(len(seen.seconds) for seen in self.seen)

    def figures(self) -> dict[str, Any]:
        """Of all clients: calls, images, attempts beyond the first, seconds of a call, errors."""
        seconds = [s for seen in self.seen for s in seen.seconds]
        errors = [error for seen in self.seen for error in seen.errors]
        calls = len(seconds) + len(errors)
        return {
            "clients": len(self.seen),
            "calls": calls,
            "images": sum(seen.images for seen in self.seen),
            "repeated by the client": sum(seen.attempts for seen in self.seen) - calls,
            **(percentiles(seconds) if seconds else {}),
            "errors": errors,
        }


def count_attempts(client: Client, seen: Seen) -> None:
    """Counts what the client sends, answered or not: every call is one attempt or more."""
    sending = client._way.sending

    def counting(call: Any) -> Any:
        attempt = sending(call)

        def counted(deadline: float, number: int) -> Any:
            seen.attempts += 1
            return attempt(deadline, number)

        return counted

    client._way.sending = counting  # type: ignore[method-assign]


def show(title: str, figures: dict[str, Any]) -> None:
    """One figure a line; of the errors the first ten."""
    print(f"\n{title}")
    for name, value in figures.items():
        if isinstance(value, list):
            print(f"  {name}: {len(value)}", *(f"\n    {line}" for line in value[:10]), sep="")
        else:
            print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}", flush=True)
