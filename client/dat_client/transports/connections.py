"""Connections to one server: HTTP/1.1 over http.client, reused, without copying a byte of a tensor.

Buffers are handed to the socket as they are, a reply is received into one array of its own size, and every wait is
limited by what is left of one deadline. urllib3 would receive each block into `bytes` and copy it from there.
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
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dat_client.errors import ProtocolError
from dat_client.wire.headers import TIMEOUT_MS

MAX_REPLY_BYTES = 4 << 30
_BLOCK = 1 << 18  # bytes read at once from a reply without a length, and given to TLS at once
_BUFFER = 1 << 16

# A host that vanished sends nothing: without these options, a call would wait for its answer until the deadline.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Unanswered(ConnectionError):
    """The connection ended before the first byte of a reply."""


@dataclass(frozen=True)
class Reply:
    """An HTTP reply; the names in `headers` are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytearray | memoryview

    def header(self, name: str) -> str | None:
        """Returns the value of a header, whose name may be in any case, None if the reply lacks it."""
        return self.headers.get(name.lower())


class Connections:
    """At most `limit` connections to the server of a URL. Thread-safe; not fork-safe: close it in the child."""

    def __init__(self, url: str, *, connect_timeout_s: float, limit: int) -> None:
        parts = urlsplit(url)
        is_https = parts.scheme == "https"
        kind = HTTPSConnection if is_https else HTTPConnection
        # Without a port, http.client would look for one in the host, and find one in ::1.
        port = kind.default_port if parts.port is None else parts.port
        context: dict[str, Any] = {"context": ssl.create_default_context()} if is_https else {}
        self._new_connection = functools.partial(kind, parts.hostname or "", port, **context)
        self._connect_timeout_s = connect_timeout_s
        self._slots = threading.BoundedSemaphore(limit)
        self._idle: deque[HTTPConnection] = deque()  # append and pop are atomic
        self._closed = False
        weakref.finalize(self, _close_all, self._idle)  # a client dropped unclosed leaves no socket open

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        buffers: Sequence[bytes | memoryview],
        deadline: float,
    ) -> Reply:
        """Sends one request and returns its whole reply.

        `deadline` is a time of time.monotonic(); the server learns what is left of it. If an idle connection turns
        out to be closed before a byte of the reply, a new one replaces it at once. Raises OSError or
        http.client.HTTPException if no whole reply arrives, ProtocolError if none ever will.
        """
        if not self._slots.acquire(timeout=time_left(deadline, "waiting for a connection")):
            raise TimeoutError("timed out waiting for a connection")
        try:
            request = (deadline, method, target, headers, buffers)
            connection = self._pop_idle()
            if connection is not None:
                with suppress(Unanswered):
                    return self._exchange(connection, *request)
            return self._exchange(self._connect(deadline), *request)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Closes the idle connections; those in use close when their request ends."""
        self._closed = True
        _close_all(self._idle)

    def _pop_idle(self) -> HTTPConnection | None:
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if not _events(connection.sock, select.POLLIN, 0.0):
                    return connection
                connection.close()  # there is nothing to read on an idle connection but its end
        return None

    def _connect(self, deadline: float) -> HTTPConnection:
        timeout = min(self._connect_timeout_s, time_left(deadline, "before connecting"))
        connection = self._new_connection(timeout=timeout)
        try:
            connection.connect()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # the server closed during the handshake
            raise
        except ssl.SSLError as error:
            raise ProtocolError(f"{connection.host}: TLS failed: {error}") from error
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return connection

    def _exchange(self, connection: HTTPConnection, deadline: float, *request: Any) -> Reply:
        """Sends a request and returns its reply; keeps the connection if it can carry another request."""
        reusable = False
        try:
            sent = _send_request(connection, deadline, *request)
            response = _begin_reply(connection, deadline)
            body = _read_body(response)
            response.read()  # nothing is left to read; http.client takes this as the end of the response
            reusable = sent and not response.will_close
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, body)
        finally:
            if not reusable:
                connection.close()
            else:
                self._idle.append(connection)
                if self._closed:
                    _close_all(self._idle)


def time_left(deadline: float, activity: str) -> float:
    """Returns the seconds until `deadline`; raises TimeoutError, which names the activity, if it has passed."""
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
    left_s = time_left(deadline, "before sending")
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
    """Returns the reply after its head was read. Raises Unanswered if the connection ends before."""

    def timed_response(sock: Any, **arguments: Any) -> HTTPResponse:
        return HTTPResponse(_DeadlineReader(sock, deadline), **arguments)  # type: ignore[arg-type]

    connection.response_class = timed_response  # type: ignore[assignment]
    try:
        return connection.getresponse()
    except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise Unanswered(str(error)) from error


def _send(sock: socket.socket, buffers: Sequence[bytes | memoryview], deadline: float) -> bool:
    """Sends the buffers. Returns False if the server answers or closes before they are sent: it refuses them."""
    tls = isinstance(sock, ssl.SSLSocket)  # with TLS, readable bytes may be a session ticket instead of an answer
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            left_s = time_left(deadline, "while sending")
            if not tls:
                events = _events(sock, select.POLLIN | select.POLLOUT, left_s)
                if not events:
                    raise TimeoutError("timed out while sending")
                if events & select.POLLIN:
                    return False
            sock.settimeout(left_s)
            view = view[sock.send(view[:_BLOCK] if tls else view) :]
    return True


def _events(sock: socket.socket, mask: int, timeout_s: float) -> int:
    """Returns those of the poll(2) events in `mask`, and errors, that occur within the time; 0 for none."""
    poller = select.poll()  # select(2) does not support descriptors above 1023
    poller.register(sock, mask)
    events = poller.poll(timeout_s * 1000)
    return events[0][1] if events else 0


def _read_body(response: HTTPResponse) -> bytearray | memoryview:
    length = response.length
    if length is None:
        grown = bytearray()
        try:
            while block := response.read(_BLOCK):
                grown += block
                _check_size(len(grown))
        except ValueError as error:  # http.client takes the negative length of a chunk for one of its own arguments
            raise ConnectionError(f"the reply has a chunk of a wrong length: {error}") from error
        return grown
    _check_size(length)
    body = np.empty(length, np.uint8).data  # a bytearray would be filled with zeros first
    received = response.readinto(body) if length else 0
    if received < length:
        raise ConnectionError(f"IncompleteRead: {received} of {length} bytes of the reply")
    return body


def _check_size(size: int) -> None:
    if size > MAX_REPLY_BYTES:
        raise ProtocolError(f"the reply has {size} bytes or more, the limit is {MAX_REPLY_BYTES}")


class _DeadlineReader(io.RawIOBase):
    """A socket in the form in which http.client reads a reply, with what is left of the deadline for each recv."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Called by http.client. Reads that exceed the buffer go straight into the caller's memory."""
        return io.BufferedReader(self, _BUFFER)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Receives once."""
        self._sock.settimeout(time_left(self._deadline, "while waiting for the reply"))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Closes the file, not the socket."""
        self._raw.close()
        super().close()
