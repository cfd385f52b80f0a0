"""Decides when a failed attempt is repeated, and how often. Q is a pure function, so repeating is harmless."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from dat_client.errors import Unavailable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
#: Status 500 in the service's own words is more likely a bug, which stays, than a passing fault of the network.
MOST_REPEATS_AFTER_500 = 8

T = TypeVar("T")


def pause_s(attempt: int, error: Unavailable, jitter: Callable[[float, float], float]) -> float:
    """Returns the pause after failed attempt 1, 2, …: exponential with full jitter, on top of Retry-After."""
    pause = jitter(0.0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 30)))
    return pause + (error.retry_after_s or 0.0)


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
    """Returns the result of `attempt(deadline, number)`, number 1, 2, …, repeated while it raises Unavailable.

    Repeats at most `retries` times; if that is None, until `deadline`, which is `timeout_s` after the call's
    beginning. `wait(seconds)` returns True to stop repeating at once. Raises what `attempt` raises; Unavailable and
    Overloaded name `target`, the number of attempts and the last cause in their message.
    """
    own_errors = 0
    for number in itertools.count(1):
        try:
            return attempt(deadline, number)
        except Unavailable as error:
            last = error
        own_errors += last.status == 500
        pause = pause_s(number, last, jitter)
        left_s = deadline - clock()
        if left_s <= 0:
            reason = f"timed out after timeout_s={timeout_s:g}"
        elif retries is not None and number > retries:
            reason = f"gave up after retries={retries}"
        elif retries is None and own_errors > MOST_REPEATS_AFTER_500:
            reason = f"gave up after {own_errors} times status 500"
        elif pause >= left_s:
            reason = f"gave up: the next attempt, in {pause:.3g} s, lies beyond timeout_s={timeout_s:g}"
        elif wait(pause):
            reason = "the client was closed"
        else:
            continue
        cause = last.cause or str(last)
        attempts = f"{number} attempt{'s' if number > 1 else ''}"
        final = copy.copy(last)
        final.args = (f"{target}: {reason}, {attempts} in {timeout_s - deadline + clock():.3g} s; last: {cause}",)
        final.attempts, final.cause = number, cause
        raise final from (last.__cause__ or last)
    raise AssertionError("unreachable")
