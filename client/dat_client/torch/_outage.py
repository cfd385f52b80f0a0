"""Waits until a service that is away answers again, so that the training does not end with it."""

from __future__ import annotations

import logging
import random
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from dat_client.errors import Unavailable
from dat_client.transports.retry import pause_s

OUTAGE_S = 1800.0  # the default of `outage_s`
WARN_EVERY_S = 60.0
NO_OUTAGE = (408, 500)  # the service is there, but the request is too slow for it, or it has a bug

log = logging.getLogger("dat_client")

T = TypeVar("T")

# The clients that have had an answer. A service that never answered is more likely a wrong URL than an outage.
_answered: weakref.WeakSet[Any] = weakref.WeakSet()


def failed_meanwhile(future: Future[Any]) -> bool:
    """Returns True if a call failed before anyone waited for it, in an outage that may have ended since."""
    error = future.exception() if future.done() and not future.cancelled() else None
    return isinstance(error, Unavailable) and error.status not in NO_OUTAGE


class Outages:
    """Repeats the calls of a client while the service is away, for at most `outage_s` seconds each time.

    Each call has its own `timeout_s`, within which the client itself repeats it. The first failure and then one a
    minute are logged as warnings of the logger `dat_client`, with what was tried and why it failed.
    """

    def __init__(self, client: Any, outage_s: float) -> None:
        self.client = client
        self.outage_s = outage_s
        self._warned_s = float("-inf")

    def outlast(self, call: Callable[[], T]) -> T:
        """Returns the result of `call`, which is called again and again while it raises Unavailable.

        Raises the last Unavailable if no call succeeded within `outage_s`, if the client never had an answer, or if
        the failure is not an outage (status 408 or 500). Raises all other exceptions at once.
        """
        begun_s, calls, attempts = time.monotonic(), 0, 0
        while True:
            try:
                answer = call()
                break
            except Unavailable as error:
                failure = error
            away_s = time.monotonic() - begun_s
            calls, attempts = calls + 1, attempts + failure.attempts
            if failure.status in NO_OUTAGE or self.client not in _answered:
                raise failure
            tried = f"attempts {attempts}, seconds {away_s:.0f}"
            if away_s >= self.outage_s:
                failure.add_note(f"the service stayed away: {tried} (outage_s={self.outage_s:g})")
                raise failure
            limit = f"waiting for at most {self.outage_s:g} s (outage_s)"
            self._warn(f"the service is away, {limit}: {tried}; last: {failure}")
            pause = pause_s(calls, failure, random.uniform)
            time.sleep(min(pause, WARN_EVERY_S, self.outage_s - away_s))
        _answered.add(self.client)
        if calls:
            log.warning("the service answers again after %.0f s", time.monotonic() - begun_s)
        return answer

    def result(self, future: Future[T]) -> T:
        """Returns or raises what `future.result()` does, and warns each minute while the answer is missing."""
        begun_s = time.monotonic()
        while not wait([future], WARN_EVERY_S).done:
            self._warn(f"no answer for {time.monotonic() - begun_s:.0f} s; the call goes on until its timeout_s")
        return future.result()

    def _warn(self, message: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s >= WARN_EVERY_S / 2:  # a call of 60 s may end a few seconds early
            self._warned_s = now_s
            log.warning("%s", message)
