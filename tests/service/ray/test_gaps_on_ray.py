"""What callers get while HAProxy starts again, and while the service stops: 503 with Retry-After or no connection.

Slow: `python -m pytest -s -m slow tests/service/ray/test_gaps_on_ray.py`
"""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import pytest

from benchmarks.processes import dat_serve, in_role, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 5
PATH = "/v2/models/identity/ready"
NO_CONNECTION = "no connection"


@dataclass(frozen=True)
class Answer:
    """The answer to one poll; `status` is "no connection" if the port is closed or the connection broke."""

    at: float
    status: int | str
    retry_after: str | None = None
    body: bytes = b""


@dataclass
class Probe:
    """Polls a path every 10 ms, each time on a new connection, until the block ends."""

    url: str
    answers: list[Answer] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _poll(self) -> None:
        parts = urlsplit(self.url)
        while not self._end.wait(0.01):
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
            at = time.monotonic()
            try:
                connection.request("GET", PATH)
                response = connection.getresponse()
                answer = Answer(at, response.status, response.getheader("Retry-After"), response.read())
            except (OSError, http.client.HTTPException):
                answer = Answer(at, NO_CONNECTION)
            finally:
                connection.close()
            self.answers.append(answer)

    def answers_again(self, since: float) -> bool:
        """Whether every poll of the last two seconds was answered with 200, and `since` is longer ago than that."""
        now = time.monotonic()
        lately = {a.status for a in self.answers[-300:] if a.at > now - 2}
        return now > since + 3 and lately == {200}


def check(answers: list[Answer]) -> Counter[int | str]:
    """Returns the number of answers of each status, after a check that every refusal is one that clients repeat."""
    for answer in answers:
        assert answer.status in (200, 503, NO_CONNECTION), answer
        if answer.status == 503:
            assert answer.retry_after == "1", answer
            assert answer.body.startswith(b'{"error": '), answer
    return Counter(a.status for a in answers)


def test_no_caller_gets_404_while_haproxy_starts_again_and_while_the_service_stops(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with dat_serve("--codec", "identity") as service:
        with Probe(service.url) as probe:
            for _ in range(KILLS):
                [haproxy] = in_role(service.pid, "haproxy")
                haproxy.kill()
                killed = time.monotonic()
                wait_until(lambda since=killed: probe.answers_again(since), 120, "HAProxy answers again")  # type: ignore[misc]
            statuses = check(probe.answers)
            stopped = len(probe.answers)
            os.kill(service.pid, signal.SIGTERM)
            assert service.process.wait(90) == 0
        at_stop = check(probe.answers[stopped:])
    with capsys.disabled():
        print(f"\n{KILLS} kills of HAProxy: {dict(statuses)}; a planned stop: {dict(at_stop)}")
    assert min(statuses[200], statuses[503], statuses[NO_CONNECTION]) >= KILLS  # it saw the start of each successor
    assert at_stop[503] > 0
    assert "(raylet)" not in service.log  # such as "Task ServeController.graceful_shutdown failed"
