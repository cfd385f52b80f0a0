"""The HTTP headers that trainer and service exchange: their names, and functions that read and write values."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Mapping

#: The length in bytes of a message's JSON part, on requests and on responses (OIP v2, binary data extension).
HEADER_LENGTH = "Inference-Header-Content-Length"

#: The request's own id, at most 64 visible ASCII characters; the service echoes it, in its logs too.
REQUEST_ID = "X-Request-Id"
#: Identifies a trainer: the service's fair queue schedules its requests together. All its processes send the same.
CLIENT_ID = "X-Dat-Client"
#: 1 for the first attempt of a call, 2 for its first repetition, and so on.
ATTEMPT = "X-Dat-Attempt"
#: Milliseconds after which the client no longer waits for the answer.
TIMEOUT_MS = "X-Dat-Timeout-Ms"

#: In an answer: the seconds, or the date, after which a refused request may be sent again (RFC 9110).
RETRY_AFTER = "Retry-After"
#: In an answer: the milliseconds that the service spent in each stage (W3C Server Timing).
SERVER_TIMING = "Server-Timing"
#: The stages of SERVER_TIMING in the order in which they happen: reading the request's body, waiting for the codec,
#: being computed. The entry `total` has the whole time from the request's first byte to the answer's.
TIMED_STAGES = ("body", "queue", "codec")


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Returns the seconds from `now_s` to the time that a Retry-After header names, None if it cannot be read.

    The header holds seconds or a date (RFC 9110).

    >>> retry_after_s("1.5", 0.0)
    1.5
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now_s
        except (ValueError, OverflowError):  # a year or a zone of twenty digits
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def format_server_timing(seconds: Mapping[str, float]) -> str:
    """Returns the value of a Server-Timing header (W3C), which is in milliseconds.

    >>> format_server_timing({"body": 0.0015, "queue": 0.02})
    'body;dur=1.500, queue;dur=20.000'
    """
    return ", ".join(f"{name};dur={1000 * s:.3f}" for name, s in seconds.items())


def parse_server_timing(value: str | None) -> dict[str, float]:
    """Returns the seconds in a Server-Timing header (W3C) by name, without entries that have no finite duration.

    >>> parse_server_timing("body;dur=1.5, queue;dur=20, cache;desc=hit")
    {'body': 0.0015, 'queue': 0.02}
    """
    seconds: dict[str, float] = {}
    for entry in (value or "").split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, number = parameter.partition("=")
            try:
                if key.strip() == "dur" and math.isfinite(milliseconds := float(number)):
                    seconds[name] = milliseconds / 1000
            except ValueError:
                continue
    return seconds
