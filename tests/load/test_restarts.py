"""A service on Ray is restarted again and again under 8 clients at full rate, which compare every answer.

    python -m pytest -s -m slow tests/load/test_restarts.py         # DAT_RESTARTS=20

The codec is `identity`, so that client and service can make many requests a second. A restart is a SIGTERM to
`dat serve`, its end, and a new `dat serve` on the same port. No client may see an error.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from benchmarks.processes import clean_environment
from dat_client import Client
from dat_service.launch import DAT, running_process
from dat_service.ports import free_port
from tests.load.traffic import show

RESTARTS = int(os.environ.get("DAT_RESTARTS", "20"))
CLIENTS = 8
TIMEOUT_S = 180.0
SERVED_S = 5.0  # between a start and the next stop
LONGEST_RESTART_S = 120.0
SIDE = 32


@dataclass
class Calls:
    """The calls of one client: the moments of right answers (time.monotonic()), their attempts, and errors."""

    answered_at: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two right answers."""
        return float(np.diff(self.answered_at).max(initial=0.0))


def send(url: str, number: int, calls: Calls, end: threading.Event) -> None:
    """Sends requests of new images until `end` is set, and records each that fails or has a wrong answer."""
    draw = np.random.default_rng(number)
    with Client(url, "identity", timeout_s=TIMEOUT_S) as client:
        while not end.is_set():
            images = draw.integers(0, 256, (int(draw.integers(1, 9)), 3, SIDE, SIDE), np.uint8)
            try:
                answer = client.discretize(images, outputs=["reconstruction"]).reconstruction
            except Exception as error:
                calls.errors.append(f"client {number}: {type(error).__name__}: {error}")
                continue
            if answer is not None and np.array_equal(answer, images):
                calls.answered_at.append(time.monotonic())
            else:
                calls.errors.append(f"client {number}: wrong answer")


def restarts(number: int = RESTARTS) -> dict[str, Any]:
    """Returns the figures; the errors of the clients are among them and not raised."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    all_calls = [Calls() for _ in range(CLIENTS)]
    end = threading.Event()
    threads = [threading.Thread(target=send, args=(url, i, calls, end)) for i, calls in enumerate(all_calls)]
    answers_per_turn, seconds_away = [], []
    try:
        for turn in range(number + 1):
            stopped = time.monotonic()
            with running_process(
                [*DAT, "serve", "--codec", "identity", "--port", str(port)], env=clean_environment()
            ) as service:
                if turn == 0:
                    for thread in threads:
                        thread.start()
                else:
                    seconds_away.append(time.monotonic() - stopped)
                before = sum(len(calls.answered_at) for calls in all_calls)
                time.sleep(SERVED_S)
                answers_per_turn.append(sum(len(calls.answered_at) for calls in all_calls) - before)
                if turn == number:
                    end.set()
                    for thread in threads:
                        thread.join(TIMEOUT_S)
                os.kill(service.pid, signal.SIGTERM)
                status = service.process.wait(90)
                assert status == 0, service.log
    finally:
        end.set()
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(TIMEOUT_S)
    return {
        "restarts": number,
        "calls": sum(len(calls.answered_at) for calls in all_calls),
        "calls/s while it serves": float(np.mean(answers_per_turn)) / SERVED_S,
        "fewest calls between two restarts": min(answers_per_turn),
        "seconds of a start, mean": float(np.mean(seconds_away)) if seconds_away else 0.0,
        "longest gap between two answers of a client, s": max(calls.longest_gap_s for calls in all_calls),
        "errors": [error for calls in all_calls for error in calls.errors],
    }


@pytest.mark.slow
@pytest.mark.timeout(120 + RESTARTS * (LONGEST_RESTART_S + SERVED_S))
def test_no_caller_sees_a_planned_restart() -> None:
    figures = restarts()
    show("restarts", figures)
    assert figures["errors"] == []
    assert figures["fewest calls between two restarts"] > CLIENTS
    assert 0 < figures["longest gap between two answers of a client, s"] < LONGEST_RESTART_S
