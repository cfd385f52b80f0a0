"""Checks arguments that are numbers or names. Each function raises InvalidRequest for a wrong value."""

from __future__ import annotations

import math
from collections.abc import Collection

from dat_client.errors import invalid

#: Longer timeouts are shortened to this (11.6 days), because poll(2) takes milliseconds as an int, at most 24 days.
LONGEST_S = 1e6


def is_number(value: object) -> bool:
    """Returns True if `value` is a finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def positive_seconds(name: str, value: float, least: str = "above 0") -> float:
    """Returns `value`, but at most LONGEST_S; raises InvalidRequest unless it is a finite number above 0."""
    if not is_number(value) or value <= 0:
        raise invalid(name, f"a finite number of seconds {least}", value=value)
    return float(min(value, LONGEST_S))


def seconds(name: str, value: float) -> float:
    """Returns `value`, but at most LONGEST_S; raises InvalidRequest unless it is a finite number of 0 or more."""
    return 0.0 if value == 0 and is_number(value) else positive_seconds(name, value, "0 or above")


def integer(name: str, value: int, least: int) -> int:
    """Returns `value`; raises InvalidRequest unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise invalid(name, f"an integer of at least {least}", value=value)
    return value


def share(name: str, value: float) -> float:
    """Returns `value`; raises InvalidRequest unless it is a number in 0..1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise invalid(name, "a number in 0..1", value=value)
    return value


def choice(name: str, value: str, choices: Collection[str]) -> str:
    """Returns `value`; raises InvalidRequest unless it is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise invalid(name, f"one of {', '.join(choices)}", value=value)
    return value
