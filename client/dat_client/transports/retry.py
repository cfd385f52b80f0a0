"""Repeats failed attempts of a call: how often, and after which pause. Q is a pure function, so this is safe."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from dat_client.errors import Unavailable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
#: A status 500 that the service itself sent is more likely a bug than a passing fault, and repeating cures no bug.
MOST_REPEATS_AFTER_500 = 8
#: A body that arrived too slowly is sent again from its beginning, and may be as slow as before.
MOST_REPEATS_AFTER_408 = 3

T = TypeVar("T")


def pause_s(attempt: int, error: Unavailable, jitter: Callable[[float, float], float]) -> float:
    """Returns the seconds to wait after failed attempt number `attempt` (1, 2, …).

    That is the server's Retry-After plus a random part (full jitter) of min(0.1 · 2^(attempt - 1), 5) seconds.
    """
    pause = jitter(0.0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 30)))
    return pause + (error.retry_after_s or 0.0)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if 1000 <= seconds < 1e12 else f"{seconds:.3g} s"


def repeat(
    attempt: Callable[[float, int], T],
    *,
    target: str,
    timeout_s: float,
    deadline: float,
    retries: int | None,
    wait: Callable[[float], bool],
    clock: Callable[[], float] = time.monotonic,
    jitter: Callable[[float, float], float] = random.uniform,
) -> T:
    """Calls `attempt(deadline, number)` with number 1, 2, … while it raises Unavailable; returns its first result.

    Repeats at most `retries` times. With retries=None it repeats until `deadline`, which lies `timeout_s` after the
    beginning of the call, but gives up at the ninth status 500 and at the fourth 408 (the body arrived too slowly).
    `wait(seconds)` is called between two attempts; it returns True if the client was closed, and then no attempt
    follows. Raises the exceptions of `attempt`. The message of the last Unavailable or Overloaded is extended by
    `target`, the number of attempts and the cause.
    """
    statuses: Counter[int | None] = Counter()
    for number in itertools.count(1):
        try:
            return attempt(deadline, number)
        except Unavailable as error:
            last = error
        statuses[last.status] += 1
        pause = pause_s(number, last, jitter)
        left_s = deadline - clock()
        if left_s <= 0:
            reason = f"timed out after timeout_s={timeout_s:g}"
        elif retries is not None and number > retries:
            reason = f"gave up after retries={retries}"
        elif retries is None and statuses[500] > MOST_REPEATS_AFTER_500:
            reason = f"gave up after {statuses[500]} times status 500"
        elif retries is None and statuses[408] > MOST_REPEATS_AFTER_408:
            reason = f"gave up after {statuses[408]} times status 408: send fewer images at once"
        elif pause >= left_s:
            reason = f"gave up: the next attempt, in {_seconds(pause)}, would begin after timeout_s={timeout_s:g}"
        elif wait(pause):
            reason = "the client was closed"
        else:
            continue
        cause = last.cause or str(last)
        attempts = f"{number} attempt{'s' if number > 1 else ''}"
        final = copy.copy(last)
        spent = _seconds(timeout_s - deadline + clock())
        final.args = (f"{target}: {reason}, {attempts} in {spent}; last: {cause}",)
        final.attempts, final.cause = number, cause
        raise final from (last.__cause__ or last)
    raise AssertionError("unreachable")
