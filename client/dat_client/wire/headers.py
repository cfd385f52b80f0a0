"""The HTTP headers that trainer and service exchange beside those of HTTP itself, and how their values are read."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Mapping

#: The length in bytes of a message's JSON part, on requests and on responses (OIP v2, binary data extension).
HEADER_LENGTH = "Inference-Header-Content-Length"

#: The request's own id, at most 64 visible ASCII characters; the service echoes it, in its logs too.
REQUEST_ID = "X-Request-Id"
#: Which trainer asks: the name under which the service's fair queue schedules it. The same in all its processes.
CLIENT_ID = "X-Dat-Client"
#: 1 for the first attempt of a call, 2 for its first repetition, and so on.
ATTEMPT = "X-Dat-Attempt"
#: Milliseconds after which the client no longer waits for the answer.
TIMEOUT_MS = "X-Dat-Timeout-Ms"

#: Of an answer: seconds, or a date, after which a refused request may be sent again (RFC 9110).
RETRY_AFTER = "Retry-After"
#: Of an answer: the milliseconds that the service spent in each stage (W3C Server Timing).
SERVER_TIMING = "Server-Timing"
#: The stages of SERVER_TIMING in the order in which they happen: reading the request's body, waiting for the codec,
#: being computed. The entry `total` has the whole time from the request's first byte to the answer's.
TIMED_STAGES = ("body", "queue", "codec")


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Seconds from `now_s` to what a Retry-After header names (RFC 9110: seconds or a date), None if unreadable.

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
    """The value of a Server-Timing header (W3C), in milliseconds.

    >>> format_server_timing({"body": 0.0015, "queue": 0.02})
    'body;dur=1.500, queue;dur=20.000'
    """
    return ", ".join(f"{name};dur={1000 * s:.3f}" for name, s in seconds.items())


def parse_server_timing(value: str | None) -> dict[str, float]:
    """The seconds in a Server-Timing header (W3C), by name; entries without a finite duration are left out.

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
