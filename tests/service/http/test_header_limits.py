"""The limits on headers with --local, on a real uvicorn."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from dat_service.http import header_limits
from dat_service.http.header_limits import MAX_BYTES, LimitedHeaders


async def length_of_body(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that responds with the number of bytes it received."""
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await send({"type": "http.response.body", "body": b"%08d" % length})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(
        length_of_body, http=LimitedHeaders, loop="uvloop", ws="none", lifespan="off", log_level="error"
    )
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)


def sent_until_closed(connection: socket.socket, piece: bytes, most: int) -> int:
    """Sends `piece` repeatedly; returns the bytes sent until the connection was closed, or `most`."""
    total = 0
    with contextlib.suppress(ConnectionError):
        while total < most:
            connection.sendall(piece)
            total += len(piece)
    return total


def answer(connection: socket.socket) -> bytes:
    """Receives everything until the connection is closed."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def test_requests_on_one_connection_go_on(port: int) -> None:
    with connect(port) as connection:
        for length in (0, 3_000_000, 7):
            field = b"a" * (MAX_BYTES // 2)
            head = b"POST / HTTP/1.1\r\nHost: a\r\nX-A: %s\r\nContent-Length: %d\r\n\r\n" % (field, length)
            connection.sendall(head + b"b" * length)
            received = b""
            while not received.endswith(b"%08d" % length):
                piece = connection.recv(65536)
                assert piece, received
                received += piece
            assert received.startswith(b"HTTP/1.1 200")


def test_headers_that_are_too_large_are_refused(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-A: ")
        time.sleep(0.1)  # in a read of its own
        connection.sendall(b"a" * (MAX_BYTES + 1))
        assert answer(connection).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET / HTTP/1.1\r\n", b"X-A: a\r\n" * 1000),
        (b"GET / HTTP/1.1\r\nX-A: ", b"a" * 8000),
        (b"GET /", b"a" * 8000),
        (b"", b"\r\n" * 4000),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: a\r\n" * 1000),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", b"a" * 8000),
    ],
    ids=["lines", "value", "address", "blank lines", "trailers", "chunk extension"],
)
def test_no_end_of_headers(port: int, start: bytes, piece: bytes) -> None:
    most = 64 * 1024 * 1024
    with connect(port) as connection:
        connection.sendall(start)
        assert sent_until_closed(connection, piece, most) < most


def test_headers_that_take_too_long(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_limits, "TIMEOUT_S", 0.2)
    with connect(port) as connection:
        assert answer(connection) == b""  # closed before anything was sent
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX-A: a")
        assert answer(connection) == b""


def test_only_headers_are_timed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_limits, "TIMEOUT_S", 1.0)
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 4\r\n\r\nab")
        time.sleep(2)
        connection.sendall(b"cd")
        assert answer(connection).endswith(b"00000004")
