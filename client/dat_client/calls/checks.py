"""Checks of arguments that are numbers or names; each raises InvalidRequest for a wrong one."""

from __future__ import annotations

import math
from collections.abc import Collection

from dat_client.errors import invalid

#: Longer timeouts are cut to this: poll(2) counts milliseconds in an int, which holds 24 days.
LONGEST_S = 1e6


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float. A bool is not a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def positive_seconds(name: str, value: float) -> float:
    """Returns a finite number of seconds above 0, cut to LONGEST_S; raises InvalidRequest."""
    if not is_number(value) or value <= 0:
        raise invalid(name, "a finite number of seconds above 0", value=value)
    return float(min(value, LONGEST_S))


def integer(name: str, value: int, least: int) -> int:
    """Returns an integer of at least `least`; raises InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise invalid(name, f"an integer of at least {least}", value=value)
    return value


def share(name: str, value: float) -> float:
    """Returns a number in 0..1; raises InvalidRequest."""
    if not is_number(value) or not 0 <= value <= 1:
        raise invalid(name, "a number in 0..1", value=value)
    return value


def choice(name: str, value: str, choices: Collection[str]) -> str:
    """Returns a string that is among the choices; raises InvalidRequest."""
    if not isinstance(value, str) or value not in choices:
        raise invalid(name, f"one of {', '.join(choices)}", value=value)
    return value
