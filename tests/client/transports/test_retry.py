from __future__ import annotations

import pytest

from dat_client.errors import InvalidRequest, Overloaded, ProtocolError, Unauthorized, Unavailable, WireError
from dat_client.transports import retry


class Time:
    """A clock that moves only when it is waited for, and a jitter that takes the longest pause."""

    def __init__(self, attempt_s: float = 0.0, stop: bool = False) -> None:
        self.now, self.attempt_s, self.stop = 100.0, attempt_s, stop
        self.waits: list[float] = []
        self.attempts = 0

    def run(self, results, *, timeout_s=60.0, retries=8):
        left = iter(results)

        def attempt(deadline: float, number: int) -> str:
            self.attempts += 1
            assert (deadline, number) == (100 + timeout_s, self.attempts)
            self.now += self.attempt_s
            result = next(left)
            if isinstance(result, Exception):
                raise result
            return result

        def wait(seconds: float) -> bool:
            self.waits.append(seconds)
            self.now += seconds
            return self.stop

        return retry.repeat(
            attempt, target="POST u", timeout_s=timeout_s, deadline=100 + timeout_s, retries=retries,
            clock=lambda: self.now, wait=wait, jitter=lambda low, high: high,
        )  # fmt: skip


@pytest.fixture
def real_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 5.0)


@pytest.mark.usefixtures("real_pauses")
def test_pauses_grow_to_a_limit_then_it_gives_up():
    time = Time()
    lost = ConnectionResetError("reset")
    error = Unavailable("u: reset", cause="ConnectionResetError: reset")
    error.__cause__ = lost
    with pytest.raises(Unavailable, match=r"retries=8, 9 attempts .*last: ConnectionResetError: reset") as caught:
        time.run([error] * 9)
    assert time.waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert caught.value.attempts == 9
    assert caught.value.__cause__ is lost
    assert caught.value.cause == "ConnectionResetError: reset"


def test_it_stops_at_the_first_good_answer():
    time = Time()
    assert time.run([Unavailable("a"), Overloaded("b", retry_after_s=3), "good"]) == "good"
    assert time.attempts == 3
    assert time.waits[1] >= 3


def test_what_is_wrong_is_not_repeated():
    for error in (InvalidRequest("m"), Unauthorized("m"), ProtocolError("m"), WireError("m")):
        time = Time()
        with pytest.raises(type(error)):
            time.run([error, "good"])
        assert time.attempts == 1


def test_retry_after_beyond_the_timeout_is_overloaded_at_once():
    time = Time()
    with pytest.raises(Overloaded, match=r"1 attempt .*last: full") as caught:
        time.run([Overloaded("full", retry_after_s=100), "good"])
    assert time.waits == []
    assert caught.value.retry_after_s == 100


def test_timeout_is_named_when_it_is_eaten():
    with pytest.raises(Unavailable, match=r"timed out after timeout_s=2\b") as caught:
        Time(attempt_s=2.5).run([Unavailable("slow"), "good"], timeout_s=2.0)
    assert caught.value.attempts == 1


def test_closing_ends_the_repeats():
    with pytest.raises(Unavailable, match="closed"):
        Time(stop=True).run([Unavailable("a"), "good"])


def test_an_absurd_retry_after_is_reported_in_few_digits():
    with pytest.raises(Overloaded, match=r"the next attempt, in 1e\+300 s, would begin"):
        Time().run([Overloaded("full", retry_after_s=1e300)])
