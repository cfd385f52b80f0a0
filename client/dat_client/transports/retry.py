"""When a failed attempt is repeated, and for how long: Q is a pure function, so repeating it is harmless.

Pure functions: no clock is read here but those that are passed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from dat_client.errors import Overloaded, Unavailable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
#: Repeats after a status 500 in the server's own words: more likely its bug, which stays, than a fault of the way.
MOST_AFTER_500 = 8

T = TypeVar("T")


def pause_s(attempt: int, error: Unavailable, jitter: Callable[[float, float], float]) -> float:
    """The wait after failed attempt 1, 2, …: exponential with full jitter, never less than Retry-After."""
    pause = jitter(0.0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 30)))
    after_s = error.retry_after_s if isinstance(error, Overloaded) else None
    return pause if after_s is None else after_s + pause


def repeat(
    attempt: Callable[[float, int], T],
    *,
    what: str,
    timeout_s: float,
    deadline: float,
    retries: int | None,
    clock: Callable[[], float],
    wait: Callable[[float], bool],
    jitter: Callable[[float, float], float],
) -> T:
    """The result of `attempt(deadline, number)`, number 1, 2, …, repeated while it raises Unavailable.

    At most `retries` times, where that is None until `deadline`, which lies `timeout_s` after the call's beginning.
    `wait(seconds)` returns True to stop repeating at once. Raises what attempt raises; Unavailable and
    Overloaded with the number of attempts and the last cause in their message.
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
            why = f"timed out after timeout_s={timeout_s:g}"
        elif retries is not None and number > retries:
            why = f"gave up after retries={retries}"
        elif retries is None and own_errors > MOST_AFTER_500:
            why = f"gave up after {own_errors} times status 500"
        elif pause >= left_s:
            why = f"gave up: the next try, in {pause:.3g} s, lies beyond timeout_s={timeout_s:g}"
        elif wait(pause):
            why = "the client was closed"
        else:
            continue
        plural = "attempt" if number == 1 else "attempts"
        spent_s = timeout_s - deadline + clock()
        message = f"{what}: {why}, {number} {plural} in {spent_s:.3g} s; last: {last.cause or last}"
        raise _final(last, message, number) from (last.__cause__ or last)
    raise AssertionError("unreachable")


def _final(last: Unavailable, message: str, attempts: int) -> Unavailable:
    cause = last.cause or str(last)
    if isinstance(last, Overloaded):
        return Overloaded(
            message, attempts=attempts, cause=cause, status=last.status, retry_after_s=last.retry_after_s
        )
    return Unavailable(message, attempts=attempts, cause=cause, status=last.status)
