"""Connections to one server: HTTP/1.1 over http.client, kept while idle, no byte of a tensor copied on the way.

Buffers are handed to the socket as they are, a reply is received into one array of its own size, and every wait on
the way has what is left of one deadline. urllib3 would receive each block into `bytes` and copy it from there.
"""

from __future__ import annotations

import io
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dat_client.calls.core import Reply
from dat_client.errors import ProtocolError
from dat_client.wire.headers import TIMEOUT_MS

MAX_REPLY_BYTES = 4 << 30
_BLOCK = 1 << 18  # of a reply that does not say its length, and of what TLS is given at once
_BUFFER = 1 << 16

# A host that vanished says nothing: without these, who waits for its answer would wait until his own deadline.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Unanswered(ConnectionError):
    """The connection ended before the first byte of a reply."""


class Connections:
    """At most `limit` connections to the server of a URL; thread-safe, not fork-safe (close it in the child)."""

    def __init__(self, url: str, *, connect_timeout_s: float, limit: int) -> None:
        parts = urlsplit(url)
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "", parts.port
        if self._port is None:  # http.client would look for one in the host, and find that of ::1
            self._port = HTTPConnection.default_port if self._context is None else HTTPSConnection.default_port
        self._connect_timeout_s = connect_timeout_s
        self._slots = threading.BoundedSemaphore(limit)
        self._idle: deque[HTTPConnection] = deque()  # its append and pop are atomic
        self._closed = False
        weakref.finalize(self, _close_all, self._idle)  # who drops a client unclosed leaves nothing open

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        buffers: Sequence[bytes | memoryview],
        deadline: float,
    ) -> Reply:
        """One request and its whole reply. `deadline` is of time.monotonic; the server is told what is left of it.

        A kept connection that turns out to be closed, nothing answered, is replaced at once by a new one. Raises
        OSError or http.client.HTTPException where no whole reply arrives, ProtocolError where none ever will.
        """
        if not self._slots.acquire(timeout=left(deadline, "waiting for a connection")):
            raise TimeoutError("timed out waiting for a connection")
        try:
            connection = self._kept()
            if connection is not None:
                try:
                    return self._exchange(connection, method, target, headers, buffers, deadline)
                except Unanswered:
                    pass
            return self._exchange(self._new(deadline), method, target, headers, buffers, deadline)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Close the idle connections; those in use close when their request ends."""
        self._closed = True
        _close_all(self._idle)

    def _kept(self) -> HTTPConnection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if not _events(connection.sock, select.POLLIN, 0.0):
                return connection
            connection.close()  # an idle connection has nothing to say but that it ended

    def _new(self, deadline: float) -> HTTPConnection:
        timeout = min(self._connect_timeout_s, left(deadline, "before connecting"))
        connection: HTTPConnection
        if self._context is None:
            connection = HTTPConnection(self._host, self._port, timeout=timeout)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        try:
            connection.connect()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # it went away in the handshake
            raise
        except ssl.SSLError as error:
            raise ProtocolError(f"{self._host}: TLS failed: {error}") from error
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return connection

    def _exchange(self, connection: HTTPConnection, *request: Any) -> Reply:
        usable = False
        try:
            reply, usable = _exchange(connection, *request)
            return reply
        finally:
            if not usable:
                connection.close()
            else:
                self._idle.append(connection)
                if self._closed:
                    _close_all(self._idle)


def left(deadline: float, where: str) -> float:
    """Seconds until `deadline`; raises TimeoutError where there are none."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(f"timed out {where}")
    return left_s


def _close_all(connections: deque[HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _exchange(
    connection: HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str],
    buffers: Sequence[bytes | memoryview],
    deadline: float,
) -> tuple[Reply, bool]:
    """The reply, and whether the connection can carry another request."""
    sock = connection.sock
    left_s = left(deadline, "before sending")
    sock.settimeout(left_s)
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader(TIMEOUT_MS, str(max(1, int(left_s * 1000))))
        connection.endheaders()
        sent = _send(sock, buffers, deadline)
    except (BrokenPipeError, ConnectionResetError):
        sent = False  # it may have said why before it closed
    with _timed_replies(connection, deadline):
        try:
            response = connection.getresponse()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise Unanswered(str(error)) from error
    body = _body(response)
    response.read()  # nothing is left; this ends the response in http.client's eyes
    reply = Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, body)
    return reply, sent and not response.will_close


def _send(sock: socket.socket, buffers: Sequence[bytes | memoryview], deadline: float) -> bool:
    """Sends the buffers; False where the server answers or closes before they are out: its refusal is heard."""
    tls = isinstance(sock, ssl.SSLSocket)  # there, something to read may be no answer but a session ticket
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            left_s = left(deadline, "while sending")
            if not tls:
                events = _events(sock, select.POLLIN | select.POLLOUT, left_s)
                if not events:
                    raise TimeoutError("timed out while sending")
                if events & select.POLLIN:
                    return False
            sock.settimeout(left_s)
            view = view[sock.send(view[:_BLOCK] if tls else view) :]
    return True


def _events(sock: socket.socket, wanted: int, timeout_s: float) -> int:
    """Which of these poll(2) events, or errors, are there within the time; 0 for none."""
    poller = select.poll()  # select(2) knows no descriptors above 1023
    poller.register(sock, wanted)
    found = poller.poll(timeout_s * 1000)
    return found[0][1] if found else 0


def _body(response: HTTPResponse) -> bytearray | memoryview:
    length = response.length
    if length is None:
        grown = bytearray()
        while block := response.read(_BLOCK):
            grown += block
            _check_size(len(grown))
        return grown
    _check_size(length)
    body = np.empty(length, np.uint8).data  # a bytearray would be filled with zeros first
    arrived = response.readinto(body) if length else 0
    if arrived < length:
        raise ConnectionError(f"IncompleteRead: {arrived} of {length} bytes of the reply")
    return body


def _check_size(size: int) -> None:
    if size > MAX_REPLY_BYTES:
        raise ProtocolError(f"a reply of {size} bytes, limit {MAX_REPLY_BYTES}")


@contextmanager
def _timed_replies(connection: HTTPConnection, deadline: float) -> Iterator[None]:
    """Inside, http.client reads its reply through `_Timed`."""

    def response(sock: Any, **arguments: Any) -> HTTPResponse:
        return HTTPResponse(_Timed(sock, deadline), **arguments)  # type: ignore[arg-type]

    connection.response_class = response  # type: ignore[assignment]
    try:
        yield
    finally:
        connection.response_class = HTTPResponse


class _Timed(io.RawIOBase):
    """A socket as the file http.client reads a reply from, each recv with what is left of the deadline."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks its socket for. Reads beyond the buffer go straight into the caller's memory."""
        return io.BufferedReader(self, _BUFFER)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """One recv."""
        self._sock.settimeout(left(self._deadline, "while waiting for the reply"))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Closes the file, not the socket."""
        self._raw.close()
        super().close()
