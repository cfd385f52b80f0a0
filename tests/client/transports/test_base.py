"""A Client needs no more of a transport than the Protocol declares: here is one without a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dat_client import Client, Overloaded, Unavailable, wire
from dat_client.calls.answers import read_response
from dat_client.calls.core import Call, Exchange
from dat_client.transports.base import Question, Transport
from tests.client.loopback import FINGERPRINT, identity


class InMemoryTransport:
    """Answers in the caller's thread, after as many failures as it is given."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.attempts: list[tuple[str, int]] = []
        self.closed = False

    def address(self, target: str) -> str:
        return f"memory:{target}"

    def prepare(self, call: Call) -> Callable[[float, int], Exchange]:
        buffers, header_length = call.encode()
        body = b"".join(buffers)

        def attempt(deadline: float, number: int) -> Exchange:
            assert deadline > time.monotonic()
            self.attempts.append((call.id, number))
            if self.failures:
                raise self.failures.pop(0)
            request = wire.decode_request(body, header_length)
            chunks, length = wire.encode_response(
                "tiny-f8", identity(request), id=request.id, parameters={"fingerprint": FINGERPRINT}
            )
            response = read_response(call, bytearray(b"".join(chunks)), str(length))
            return Exchange(response, {"codec": 0.0}, time.perf_counter(), 0.0, len(body), 0)

        return attempt

    def ask(self, question: Question, deadline: float, number: int = 1) -> dict[str, Any]:
        if self.failures:
            raise self.failures.pop(0)
        return {question: True, "name": "memory"}

    def close(self) -> None:
        self.closed = True


def client_with(transport: Transport, **options: Any) -> Client:
    client = Client("http://unused", timeout_s=20, **options)
    client._transport = transport
    return client


def test_every_call_goes_through_the_transport(images):
    transport = InMemoryTransport()
    with client_with(transport) as client:
        assert np.array_equal(client.discretize(images).reconstruction, images)
        assert np.array_equal(client.submit(images).result(20).reconstruction, images)
        assert client.decode(np.zeros((1, 2, 2), int)).shape == (1, 3, 16, 16)
        assert client.metadata()["name"] == client.server_metadata()["name"] == "memory"
        assert client.live()
        assert client.ready()
        client.wait_ready(1)
    assert [number for _, number in transport.attempts] == [1, 1, 1]
    assert transport.closed


def test_failed_attempts_are_repeated(images):
    transport = InMemoryTransport(Unavailable("lost"), Overloaded("full", retry_after_s=0))
    with client_with(transport) as client:
        assert np.array_equal(client.discretize(images).reconstruction, images)
    assert [number for _, number in transport.attempts] == [1, 2, 3]
    assert len({call_id for call_id, _ in transport.attempts}) == 1
    with (
        client_with(InMemoryTransport(*[Unavailable("lost")] * 3), retries=2) as client,
        pytest.raises(Unavailable, match=r"POST memory:infer: gave up after retries=2, 3 attempts .*last: lost"),
    ):
        client.discretize(images)


def test_a_batch_may_be_split(images):
    transport = InMemoryTransport()
    with client_with(transport, max_in_flight=2) as client:
        assert np.array_equal(client.discretize(images).reconstruction, images)
    assert len({call_id for call_id, _ in transport.attempts}) == 2
