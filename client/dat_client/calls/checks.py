"""Arguments that are plain numbers, checked."""

from __future__ import annotations

import math

from dat_client.errors import InvalidRequest, shown

#: Longer is as good as for ever, and poll(2) counts milliseconds in an int: 24 days.
LONGEST_S = 1e6


def positive(name: str, value: float) -> float:
    """A finite number of seconds above 0, at most LONGEST_S of them; raises InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        message = f"{name}: must be a finite number of seconds above 0, got {shown(value)}"
        raise InvalidRequest(message, field=name, value=value, limit="> 0")
    return float(min(value, LONGEST_S))


def whole(name: str, value: int, least: int, most: int | None = None) -> int:
    """An integer from `least` to `most`; raises InvalidRequest."""
    wrong = isinstance(value, bool) or not isinstance(value, int)
    if wrong or value < least or (most is not None and value > most):
        limit = f">= {least}" if most is None else f"{least} to {most}"
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        message = f"{name}: must be an integer {allowed}, got {shown(value)}"
        raise InvalidRequest(message, field=name, value=value, limit=limit)
    return value
