"""Writes numbers for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Returns the seconds as text: as `12.3 s`, or as `h:mm:ss` from a minute on.

    >>> duration(12.34), duration(100_000)
    ('12.3 s', '27:46:40')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
