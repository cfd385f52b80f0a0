"""Reuses HTTP/1.1 connections to one server (http.client) and never copies the bytes of a tensor.

Buffers are passed to the socket unchanged, and a reply is received into one array of the reply's size. Each wait is
limited by the time left until the request's deadline. urllib3 is not used because it receives each block into
`bytes` and copies it from there.
"""

from __future__ import annotations

import functools
import io
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    LineTooLong,
    UnknownProtocol,
)
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dat_client.errors import ProtocolError
from dat_client.wire.headers import TIMEOUT_MS

MOST_ERROR_BYTES = 1 << 16  # of the body of an error, only so many bytes are read
_BLOCK = 1 << 18  # the most bytes that are sent at once over TLS
_BUFFER = 1 << 16  # the most bytes that are read at once from a reply without a length

# A host that was cut off sends nothing. Without these options a call would wait for its answer until the deadline.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Unanswered(ConnectionError):
    """Raised if the connection ends before the first byte of a reply."""


@dataclass(frozen=True)
class Reply:
    """An HTTP reply; the names in `headers` are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray | memoryview

    def header(self, name: str) -> str | None:
        """Returns the value of a header, or None if the reply lacks it. The case of `name` does not matter."""
        return self.headers.get(name.lower())


class Connections:
    """Holds at most `limit` connections to the server of a URL.

    Threads may share it. It does not survive a fork: close it in the child and make a new one.
    """

    def __init__(self, url: str, *, connect_timeout_s: float, limit: int) -> None:
        parts = urlsplit(url)
        is_https = parts.scheme == "https"
        kind = HTTPSConnection if is_https else HTTPConnection
        # If no port is passed, http.client looks for one in the host name, and takes the 1 of ::1 for a port.
        port = kind.default_port if parts.port is None else parts.port
        context: dict[str, Any] = {"context": ssl.create_default_context()} if is_https else {}
        self._new_connection = functools.partial(kind, parts.hostname or "", port, **context)
        self._connect_timeout_s = connect_timeout_s
        self._all_in_use = f"all {limit} connections to {parts.netloc} were in use"
        self._slots = threading.BoundedSemaphore(limit)
        self._idle: deque[HTTPConnection] = deque()  # append and pop are atomic
        self._closed = False
        weakref.finalize(self, _close_all, self._idle)  # closes the sockets of a client that was never closed

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        buffers: Sequence[bytes | memoryview],
        deadline: float,
        most_bytes: int,
    ) -> Reply:
        """Sends one request and returns its whole reply.

        `deadline` is a time of time.monotonic(); the time left until then is sent to the server (X-Dat-Timeout-Ms).
        `most_bytes` is the largest body that a reply of status 200 may have. Of the body of any other reply, the
        first MOST_ERROR_BYTES are returned. If a reused connection ends before the first byte of the reply, the
        request is sent again at once over a new connection. Raises OSError or http.client.HTTPException if no whole
        reply arrives, and ProtocolError if repeating cannot help: TLS fails, or the head or the body of the reply
        is longer than is allowed.
        """
        if not self._slots.acquire(timeout=time_left(deadline, "before a connection was requested")):
            raise TimeoutError(f"timed out while {self._all_in_use} (max_connections)")
        try:
            request = (method, target, headers, buffers)
            connection = self._pop_idle()
            if connection is not None:
                with suppress(Unanswered):
                    return self._exchange(connection, most_bytes, deadline, *request)
            return self._exchange(self._connect(deadline), most_bytes, deadline, *request)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Closes the idle connections now, and each connection in use as soon as its request ends."""
        self._closed = True
        _close_all(self._idle)

    def _pop_idle(self) -> HTTPConnection | None:
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if not _events(connection.sock, select.POLLIN, 0.0):
                    return connection
                connection.close()  # an idle connection becomes readable only when the server closes it
        return None

    def _connect(self, deadline: float) -> HTTPConnection:
        timeout = min(self._connect_timeout_s, time_left(deadline, "before connecting to the server"))
        connection = self._new_connection(timeout=timeout)
        try:
            connection.connect()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # the server closed during the handshake
            raise
        except ssl.SSLError as error:
            raise ProtocolError(f"{connection.host}:{connection.port}: TLS failed: {error}") from error
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return connection

    def _exchange(self, connection: HTTPConnection, most_bytes: int, deadline: float, *request: Any) -> Reply:
        """Sends a request and returns its reply. Then keeps the connection for a later request, or closes it."""
        reusable = False
        try:
            sent = _send_request(connection, deadline, *request)
            response = _begin_reply(connection, deadline)
            if response.status == 200:
                body, is_whole = _read_body(response, most_bytes)
                if not is_whole:
                    size = f"more than {most_bytes}" if response.length is None else response.length
                    raise ProtocolError(f"the reply has {size} bytes, must have at most {most_bytes}")
            else:
                body, is_whole = _read_body(response, MOST_ERROR_BYTES)
            if is_whole:
                response.read()  # nothing is left to read; http.client takes this as the end of the response
            reusable = is_whole and sent and not response.will_close
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, body)
        finally:
            if not reusable:
                connection.close()
            else:
                self._idle.append(connection)
                if self._closed:
                    _close_all(self._idle)


def time_left(deadline: float, activity: str) -> float:
    """Returns the seconds until `deadline`. If it has passed, raises TimeoutError(f"timed out {activity}")."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(f"timed out {activity}")
    return left_s


def _close_all(connections: deque[HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _send_request(
    connection: HTTPConnection,
    deadline: float,
    method: str,
    target: str,
    headers: Mapping[str, str],
    buffers: Sequence[bytes | memoryview],
) -> bool:
    """Sends the head and the body. Returns False if the server answers or closes before all is sent."""
    left_s = time_left(deadline, "before sending the request")
    connection.sock.settimeout(left_s)
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader(TIMEOUT_MS, str(max(1, int(left_s * 1000))))
        connection.endheaders()
        return _send(connection.sock, buffers, deadline)
    except (BrokenPipeError, ConnectionResetError):
        return False  # the server may have answered before it closed


def _begin_reply(connection: HTTPConnection, deadline: float) -> HTTPResponse:
    """Reads the status line and the headers of the reply.

    Raises Unanswered if the connection ends before them, and ProtocolError for a head that no server of ours sends:
    http.client accepts at most 100 headers, and 65,536 bytes in a line.
    """

    def timed_response(sock: Any, **arguments: Any) -> HTTPResponse:
        return HTTPResponse(_DeadlineReader(sock, deadline), **arguments)  # type: ignore[arg-type]

    connection.response_class = timed_response  # type: ignore[assignment]
    try:
        return connection.getresponse()
    except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise Unanswered(str(error)) from error
    except HTTPException as error:
        # Only these cannot be the beginning of a good head that was cut off. Too many headers have no class.
        if isinstance(error, LineTooLong | UnknownProtocol) or type(error) is HTTPException:
            raise ProtocolError(f"the head of the reply is not valid: {error}") from error
        raise


def _send(sock: socket.socket, buffers: Sequence[bytes | memoryview], deadline: float) -> bool:
    """Sends the buffers. Returns False if the server answers or closes, and so refuses them, before the end."""
    tls = isinstance(sock, ssl.SSLSocket)  # with TLS, readable bytes may be a session ticket instead of an answer
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            left_s = time_left(deadline, "while sending the request")
            if not tls:
                events = _events(sock, select.POLLIN | select.POLLOUT, left_s)
                if not events:
                    raise TimeoutError("timed out while sending the request")
                if events & select.POLLIN:
                    return False
            sock.settimeout(left_s)
            view = view[sock.send(view[:_BLOCK] if tls else view) :]
    return True


def _events(sock: socket.socket, mask: int, timeout_s: float) -> int:
    """Waits for poll(2) events in `mask` and for errors of the socket. Returns 0 if none occurs within the time."""
    poller = select.poll()  # select(2) does not support descriptors above 1023
    poller.register(sock, mask)
    events = poller.poll(timeout_s * 1000)
    return events[0][1] if events else 0


def _read_body(response: HTTPResponse, most_bytes: int) -> tuple[bytes | bytearray | memoryview, bool]:
    """Returns the body and True, or the beginning of a body that has more than `most_bytes`, and False.

    Never holds more than `most_bytes` and one buffer. Raises ConnectionError for a body that ends too early.
    """
    length = response.length
    if length is None:
        grown = bytearray()
        try:
            while block := response.read(min(_BUFFER, most_bytes + 1 - len(grown))):
                grown += block
                if len(grown) > most_bytes:
                    return grown[:most_bytes], False
        except ValueError as error:  # http.client passes the negative length of a chunk to read()
            raise ConnectionError(f"the length of a chunk in the reply is not valid: {error}") from error
        return grown, True
    if length > most_bytes:
        return (b"" if response.status == 200 else response.read(most_bytes)), False
    body = np.empty(length, np.uint8).data  # unlike a bytearray, it is not filled with zeros first
    received = response.readinto(body) if length else 0
    if received < length:
        raise ConnectionError(f"IncompleteRead: only {received} of the reply's {length} bytes were received")
    return body, True


class _DeadlineReader(io.RawIOBase):
    """The file from which http.client reads a reply; each receive waits at most until the deadline."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Called by http.client. A read larger than the buffer goes directly into the caller's memory."""
        return io.BufferedReader(self, _BUFFER)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Receives into `buffer` once and returns the number of bytes, 0 at the end of the connection."""
        self._sock.settimeout(time_left(self._deadline, "while waiting for the reply"))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Closes this file but leaves the socket open."""
        self._raw.close()
        super().close()
