"""The shared runner, with contestants and a clock that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dat_service.bench.timing import Timing, cpu_clock, ratio, time_in_turns


def fake(order: list[str], cost: dict[str, list[float]]) -> tuple[dict[str, Callable[[], object]], object]:
    """Contestants that note their name, and a clock that gives each its next cost."""
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: order.append(name) for name in cost}
    left = {name: iter(values) for name, values in cost.items()}

    def clock(call: Callable[[], object], count: int) -> float:
        for _ in range(count):
            call()
        return next(left[order[-1]]) * count

    return calls, clock


def test_contestants_take_turns_forwards_and_backwards() -> None:
    order: list[str] = []
    calls, clock = fake(order, {name: [9.0, 9.0, 1.0, 2.0, 3.0] for name in "abc"})
    timings = time_in_turns(calls, rounds=3, warmup=2, clock=clock, least_s=0)  # type: ignore[arg-type]
    assert "".join(order) == "aabbcc" + "abc" + "cba" + "abc"
    assert timings["b"] == Timing((1.0, 2.0, 3.0), 1)
    assert timings["b"].median == 2.0


def test_short_calls_are_joined_to_one_sample() -> None:
    order: list[str] = []
    calls, clock = fake(order, {"a": [0.01, 0.02, 0.03]})
    timings = time_in_turns(calls, rounds=2, warmup=1, clock=clock, least_s=0.05)  # type: ignore[arg-type]
    assert len(order) == 1 + 5 + 5
    assert timings["a"].calls == 5
    assert timings["a"].seconds == pytest.approx((0.02, 0.03))


def test_one_that_fails_is_listed_and_the_others_go_on() -> None:
    left = iter(range(3))

    def tires() -> None:
        if next(left, None) is None:
            raise RuntimeError("CUDA out of\n memory")

    timings = time_in_turns(
        {"good": lambda: None, "never": lambda: 1 / 0, "tires": tires}, rounds=5, warmup=1, least_s=0
    )
    assert timings["never"].error == "ZeroDivisionError: division by zero"
    assert timings["tires"].error == "RuntimeError: CUDA out of memory"
    assert len(timings["good"].seconds) == 5
    assert ratio(timings["tires"], timings["good"]) is None


def test_ratio_is_taken_round_by_round() -> None:
    times = ratio(Timing((1.0, 2.0, 1.0)), Timing((2.0, 2.0, 4.0)))
    assert times is not None
    assert (times.median, times.low, times.high) == (2.0, 1.0, 4.0)


def test_cpu_clock_measures_all_calls() -> None:
    calls: list[int] = []
    assert cpu_clock(lambda: calls.append(1), 7) > 0
    assert len(calls) == 7
