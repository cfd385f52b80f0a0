"""Times contestants in turns within one run, so that disturbances of the machine hit all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dat_workers.errors import one_line

Clock = Callable[[Callable[[], object], int], float]

LEAST_S = 0.05  # the least length of a sample, if need be of several calls: shorter ones are mostly noise


@dataclass(frozen=True)
class Timing:
    """The seconds per call of one contestant, one number for each round; or the error that put it out."""

    seconds: tuple[float, ...]
    calls: int = 0  # of the contestant, averaged in each number
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """The speed of a contestant relative to another one, from the rounds that both have run."""

    median: float
    low: float
    high: float


def cpu_clock(call: Callable[[], object], calls: int) -> float:
    """Returns the wall-clock seconds of so many calls."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started


def cuda_clock(call: Callable[[], object], calls: int) -> float:
    """Returns the seconds between two CUDA events around so many calls, with the GPU idle before and after.

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
    """Returns the clock for a device: CUDA events on a GPU, else the wall clock."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def time_in_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Clock = cpu_clock,
    least_s: float = LEAST_S,
) -> dict[str, Timing]:
    """Times the contestants round by round, in alternating order, so that a drift affects all alike.

    >>> timings = time_in_turns({"sum": lambda: sum(range(999)), "none": lambda: None}, rounds=3, least_s=0)
    >>> sorted(timings), len(timings["sum"].seconds)
    (['none', 'sum'], 3)

    Each contestant is called `warmup` times, at least once, before any is measured; the last of these calls decides
    how many calls make one sample of `least_s`. A contestant that raises (out of memory, a shape it cannot run) is
    out from then on and its timing carries the error; the others go on.
    """
    calls: dict[str, int] = {}
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, call in contestants.items():
        try:
            for _ in range(max(1, warmup)):
                call_s = clock(call, 1)
            calls[name] = max(1, min(1000, round(least_s / max(call_s, 1e-9))))
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
    """Returns how many times as fast as the baseline a contestant is, by rounds; None if either did not run."""
    if timing.error or baseline.error or not timing.seconds:
        return None
    each = [theirs / ours for ours, theirs in zip(timing.seconds, baseline.seconds, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))
