"""Times several functions in turns within one run, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dat_workers.errors import one_line

Clock = Callable[[Callable[[], object], int], float]

# The least length of a sample, if need be of several calls, because shorter samples are mostly noise.
LEAST_S = 0.05


@dataclass(frozen=True)
class Timing:
    """The seconds per call of one contestant, one number for each round, or its error."""

    seconds: tuple[float, ...]
    calls: int = 0  # the number of calls that each number is the mean of
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """The speed of a contestant divided by the speed of a baseline: median, lowest and highest of all rounds."""

    median: float
    low: float
    high: float


def cpu_clock(call: Callable[[], object], calls: int) -> float:
    """Returns the wall-clock seconds that `calls` calls of `call` take."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started


def cuda_clock(call: Callable[[], object], calls: int) -> float:
    """Returns the seconds that `calls` calls of `call` take on the GPU, measured with two CUDA events.

    The GPU is idle before the first event and after the second. If `call` uses its own CUDA streams, it must
    make the current stream wait for them.
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
    """Returns the clock that fits a device: `cuda_clock` for a GPU, else `cpu_clock`."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def time_in_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Clock = cpu_clock,
    least_s: float = LEAST_S,
) -> dict[str, Timing]:
    """Returns the timing of each contestant; the order alternates by round, so that a drift affects all alike.

    >>> timings = time_in_turns({"sum": lambda: sum(range(999)), "none": lambda: None}, rounds=3, least_s=0)
    >>> sorted(timings), len(timings["sum"].seconds)
    (['none', 'sum'], 3)

    Before the first round, each contestant is called `warmup` times, and at least once. The duration of the last of
    these calls determines how many calls make one sample of about `least_s` seconds. If a contestant raises an
    error (too little memory, an unsupported shape), it is not called again and its timing contains the error; the
    measurement of the other contestants continues.
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


def groups_with_baseline(names: Sequence[str], baseline: str, size: int) -> list[list[str]]:
    """Splits contestants into groups of up to `size`, each with the baseline besides, if it is among them.

    >>> groups_with_baseline(["a", "base", "b", "c"], "base", 2)
    [['base', 'a', 'b'], ['base', 'c']]
    """
    first = [baseline] if baseline in names else []
    others = [name for name in names if name != baseline]
    parts = [others[i : i + size] for i in range(0, len(others), size)]
    return [first + part for part in parts or [[]]]


def ratio(timing: Timing, baseline: Timing) -> Ratio | None:
    """Returns the speed of a contestant divided by the baseline's, or None if one of them was not measured."""
    if timing.error or baseline.error or not timing.seconds:
        return None
    each = [theirs / ours for ours, theirs in zip(timing.seconds, baseline.seconds, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))
