from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fuzz.fuzz import NUMBER, fuzz, fuzz_service, is_whole, status_of
from tests.fuzz.requests import CODEC, MUTATIONS, good_requests, mutated
from tests.load.traffic import show


def test_mutations_are_the_same_every_time_and_of_all_kinds() -> None:
    good = good_requests()
    messages = [mutated(i, good) for i in range(300)]
    assert [m.to_bytes() for m in messages] == [mutated(i, good).to_bytes() for i in range(300)]
    assert {m.kind for m in messages} == set(MUTATIONS)
    assert len({m.to_bytes() for m in messages} - {m.to_bytes() for m in good}) > 280


def test_answers_are_read_to_their_end() -> None:
    reply = b"HTTP/1.1 422 Unprocessable Entity\r\nContent-Length: 5\r\n\r\nabcde"
    assert status_of(reply) == 422
    assert [is_whole(reply[:i], head=False) for i in (0, 40, len(reply) - 1, len(reply))] == [False] * 3 + [True]
    assert is_whole(reply[:-5], head=True)
    assert status_of(b"") == 0


def test_300_mutated_requests(serve_app: Callable[..., str]) -> None:
    fuzzed = fuzz(serve_app(codec=CODEC, threads=1), 300)
    assert fuzzed.faults == []
    assert {status for _, status in fuzzed.statuses} >= {200, 400, 404, 422}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arguments", [["--local"], []], ids=["local", "ray"])
def test_many_mutated_requests(arguments: list[str]) -> None:
    figures = fuzz_service(NUMBER, *arguments)
    show(f"dat serve {' '.join(arguments)}", figures)
    assert figures["errors"] == []
    assert figures["processes that grew or ended"] == []
