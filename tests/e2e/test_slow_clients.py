"""Clients that promise bodies and send nothing, that are slow, and that stop reading: what they may hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import numpy as np
import pytest

from dat_service.http.body import Pace
from tests.e2e.test_queue import status_from
from tests.raw_requests import Reply, infer_images, open_request, send, unread_request

GOOD = np.zeros((1, 3, 8, 8), np.uint8)
MIB = 1 << 20


def gauges(url: str) -> dict[str, float]:
    """Returns the gauges of the replica: what it holds now."""
    found: dict[str, float] = json.loads(send(url, "GET", "/v1/status").body)["gauges"]
    return found


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_promises_hold_nothing(serve_app: Callable[..., str], source: str) -> None:
    """An address that promises 40 bodies of 64 MB keeps neither its neighbours nor itself from being served."""
    url = serve_app(codec="identity", max_requests=8, max_body_bytes=64 * MIB, max_held_bytes=256 * MIB)
    with ExitStack() as promises:
        for _ in range(40):
            promises.enter_context(open_request(url, 64 * MIB))
        time.sleep(0.3)  # until their headers have been read
        began = time.monotonic()
        assert [status_from(url, source=source) for _ in range(10)] == [200] * 10
        assert time.monotonic() - began < 2
        assert (gauges(url)["held"], gauges(url)["held_bytes"]) == (0, 0)


def test_bytes_are_held_as_they_arrive(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity", max_requests=1)
    with open_request(url, 64 * MIB) as promise:
        promise.sendall(bytes(MIB))
        deadline = time.monotonic() + 20
        while gauges(url)["held_bytes"] < MIB:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (gauges(url)["held"], gauges(url)["held_bytes"]) == (0, MIB)
        assert infer_images(url, GOOD, "UINT8").status == 200
    while gauges(url)["held_bytes"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_slow_body_is_told_what_to_do(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity", body_timeout_s=0.3, min_body_rate=10_000)
    with open_request(url, 100_000) as slow:
        slow.sendall(bytes(1000))
        answer = slow.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    error = Reply(408, {}, body).error
    assert error["field"] == "body"
    assert error["value"].startswith("1000 of 100000 bytes in 0.")
    assert error["limit"].startswith("at least 10000 bytes per second after pauses of 0.3 s together; send fewer")
    assert error["error"].endswith("the operator of the service can lower DAT_MIN_BODY_RATE")
    assert infer_images(url, GOOD, "UINT8").status == 200


def test_slow_and_steady_body_is_taken(serve_app: Callable[..., str]) -> None:
    """A thin link needs many times body_timeout_s for a body; it is refused only below min_body_rate."""
    url = serve_app(codec="identity", body_timeout_s=0.5, min_body_rate=1000)
    with open_request(url, 8000) as steady:
        for _ in range(40):  # about 4000 bytes per second, for 2 s
            steady.sendall(bytes(200))
            time.sleep(0.05)
        assert steady.recv(12) == b"HTTP/1.1 400"  # zeros are not JSON; the body itself was taken


def test_steady_reader_is_served_and_one_that_stops_is_cut(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity", max_requests=1, body_timeout_s=1, min_body_rate=500_000)
    with unread_request(url) as reader:
        received = 0
        while received < 12 * MIB:  # about 4 MB/s, for 3 s
            chunk = reader.recv(200_000)
            assert chunk, received
            received += len(chunk)
            time.sleep(len(chunk) / 4e6)
    with unread_request(url) as stopped:
        assert stopped.recv(12) == b"HTTP/1.1 200"
        began = time.monotonic()
        while infer_images(url, GOOD, "UINT8").status != 200:
            assert time.monotonic() - began < 20  # 12 MB at the least rate would take 24 s
            time.sleep(0.05)
        received = 12
        with suppress(ConnectionResetError):
            while chunk := stopped.recv(MIB):
                received += len(chunk)
        assert received < 12 * MIB


def test_pace_forgets_what_was_fast_long_ago() -> None:
    pace = Pace(100.0, pause_s=15.0, least_rate=1000)
    assert pace.until == 115
    assert pace.moved(101.0, 500) == 115.5
    assert pace.moved(102.0, 10**9) == 117  # a second at most is saved for each second, up to the pause
    assert pace.moved(110.0, 1000) == 118
    assert pace.moved(110.0, 0) == 118
