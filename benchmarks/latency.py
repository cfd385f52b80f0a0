"""Statistics over the times of single calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

CALLS_IN_A_BLOCK = 25


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns `calls`, `median_s`, `p99_s`, `longest_s` of call times, and the 99th percentile over the median."""
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "calls": len(ordered),
        "median_s": median,
        "p99_s": p99,
        "longest_s": ordered[-1],
        "p99_over_median": p99 / median,
    }


def alternate_calls(calls: Mapping[str, Callable[[], object]], number: int) -> dict[str, dict[str, float]]:
    """Returns the percentiles of `number` single calls of each contestant, which take turns in blocks of calls."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    while any(len(times) < number for times in seconds.values()):
        for name, call in calls.items():
            for _ in range(min(CALLS_IN_A_BLOCK, number)):
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    return {name: percentiles(times) for name, times in seconds.items()}
