"""Contestants alternate in one run: what the machine does meanwhile, it does to all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[Callable[[], object], int], float]

LEAST_S = 0.05  # a sample shorter than this is made of several calls: clocks and launches are noisy below


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contestant, one number a round; or why there are none."""

    seconds: tuple[float, ...]
    calls: int = 0  # of the contestant, behind each number
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another contestant, from the rounds both have run."""

    median: float
    low: float
    high: float


def cpu_clock(call: Callable[[], object], calls: int) -> float:
    """Wall-clock seconds of so many calls."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started


def cuda_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds between two CUDA events around so many calls, queues empty before and after.

    A contestant that works on streams of its own must make the current one wait for them.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def clock_for(device: torch.device) -> Clock:
    """CUDA events on a GPU, else the wall clock."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def one_line(error: BaseException) -> str:
    """An error as text: kept as an exception it would keep its frames' tensors alive."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Clock = cpu_clock,
    least_s: float = LEAST_S,
) -> dict[str, Timing]:
    """Times the contestants round by round, forwards and backwards in turn, so that a drift hits all alike.

    >>> timings = alternate({"sum": lambda: sum(range(999)), "none": lambda: None}, rounds=3, least_s=0)
    >>> sorted(timings), len(timings["sum"].seconds)
    (['none', 'sum'], 3)

    Each is called `warmup` times before any is measured, at least once; the last of these calls decides how many
    calls make one sample of `least_s`. One that raises (out of memory, a shape it cannot run) is out from there
    on and carries its error; the others go on.
    """
    calls: dict[str, int] = {}
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, call in contestants.items():
        try:
            for _ in range(max(1, warmup)):
                one = clock(call, 1)
            calls[name] = max(1, min(1000, round(least_s / max(one, 1e-9))))
        except Exception as error:
            errors[name] = one_line(error)
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else list(reversed(calls)):
            if name in errors:
                continue
            try:
                seconds[name].append(clock(contestants[name], calls[name]) / calls[name])
            except Exception as error:
                errors[name] = one_line(error)
    return {
        name: Timing((), 0, errors[name]) if name in errors else Timing(tuple(seconds[name]), calls[name])
        for name in contestants
    }


def ratio(timing: Timing, baseline: Timing) -> Ratio | None:
    """Times as fast as the baseline, round by round: median, lowest, highest. None where either did not run."""
    if timing.error or baseline.error or not timing.seconds:
        return None
    each = [theirs / ours for ours, theirs in zip(timing.seconds, baseline.seconds, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def rates(timing: Timing, images: int) -> dict[str, Any]:
    """A timing in images/s, ready for JSON: median, lowest, highest, every round; or the error."""
    if timing.error:
        return {"error": timing.error}
    each = [images / s for s in timing.seconds]
    return {
        "images_per_s": statistics.median(each),
        "low": min(each),
        "high": max(each),
        "rounds": each,
        "calls_a_round": timing.calls,
    }
