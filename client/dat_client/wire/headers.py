"""The HTTP headers that trainer and service exchange: their names, and functions that read and write values."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Mapping

#: The length in bytes of a message's JSON part, on requests and on responses (OIP v2, binary data extension).
HEADER_LENGTH = "Inference-Header-Content-Length"

#: The id of the request, at most 64 visible ASCII characters. The service sends it back and writes it to its logs.
REQUEST_ID = "X-Request-Id"
#: The id of a trainer, the same in all its processes. The service's fair queue shares the codec among trainers.
CLIENT_ID = "X-Dat-Client"
#: 1 for the first attempt of a call, 2 for its first repetition, and so on.
ATTEMPT = "X-Dat-Attempt"
#: Milliseconds after which the client no longer waits for the answer.
TIMEOUT_MS = "X-Dat-Timeout-Ms"

#: In an answer: the seconds, or the date, after which a refused request may be sent again (RFC 9110).
RETRY_AFTER = "Retry-After"
#: In an answer: the milliseconds that the service spent in each stage (W3C Server Timing).
SERVER_TIMING = "Server-Timing"
#: The stages of SERVER_TIMING in their order: reading the request's body, waiting for the codec, and computing. The
#: entry `total` is the whole time from the first byte of the request to the first byte of the answer.
TIMED_STAGES = ("body", "queue", "codec")


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Returns the pause in seconds that a Retry-After header asks for; None if `value` is None or not valid.

    The header holds seconds, or a date (RFC 9110) from which `now_s`, a time.time(), is subtracted.

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
        except (ValueError, OverflowError):  # OverflowError: a year or a time zone of twenty digits
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def format_server_timing(seconds: Mapping[str, float]) -> str:
    """Formats times as the value of a Server-Timing header (W3C), which is in milliseconds.

    >>> format_server_timing({"body": 0.0015, "queue": 0.02})
    'body;dur=1.500, queue;dur=20.000'
    """
    return ", ".join(f"{name};dur={1000 * s:.3f}" for name, s in seconds.items())


def parse_server_timing(value: str | None) -> dict[str, float]:
    """Returns the durations of a Server-Timing header (W3C) by name, in seconds; skips those that are not finite.

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
