"""HTTP/1.1 with urllib3: one request, one reply, buffers sent as they are, one deadline over all of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, IncompleteRead, SSLError
from urllib3.response import BaseHTTPResponse

from ._core import Reply
from .errors import InvalidRequest, ProtocolError, Unavailable, shown

MAX_REPLY_BYTES = 4 << 30
_BLOCK = 1 << 18  # one recv's worth; the deadline is looked at between blocks


def check_url(url: str) -> str:
    """The base URL without a trailing slash; raises InvalidRequest for what is not one.

    >>> check_url("http://codec:8000/prefix/")
    'http://codec:8000/prefix'
    """
    limit = "http://host:port or https://host:port/prefix"

    def refuse(problem: str) -> InvalidRequest:
        return InvalidRequest(f"url: {problem}, got {shown(url)}", field="url", value=url, limit=limit)

    if not isinstance(url, str):
        raise refuse(f"must be {limit}")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises for a bad one)
    except ValueError as error:
        raise refuse(str(error)) from None
    if parts.scheme not in ("http", "https"):
        raise refuse(f"scheme must be http or https, as in {limit}")
    if not parts.hostname:
        raise refuse(f"host missing, must be {limit}")
    if parts.username is not None:
        raise InvalidRequest("url: no user or password in it; use api_key", field="url", limit=limit)
    if parts.query or parts.fragment:
        raise refuse(f"no query and no fragment, must be {limit}")
    return url.rstrip("/")


def codec_path(codec: str) -> str:
    """The path of a codec, its name percent-encoded.

    >>> codec_path("a/b c")
    '/v2/models/a%2Fb%20c'
    """
    return f"/v2/models/{quote(codec, safe='')}"


class _Body:
    """The buffers of a request, giving each send what is left until the deadline.

    urllib3 sends under the connect timeout, which is far too short for a batch on a slow line.
    """

    def __init__(self, buffers: list[bytes | memoryview], deadline: float) -> None:
        self.buffers = buffers
        self.deadline = deadline
        self.connection: HTTPConnection | None = None

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for buffer in self.buffers:
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out while sending")
            sock = getattr(self.connection, "sock", None)
            if sock is not None:
                sock.settimeout(left_s)
            yield buffer


class _Http(HTTPConnection):
    def request(self, method: str, url: str, body: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(body, _Body):
            body.connection = self
        super().request(method, url, body, *args, **kwargs)


class _Https(_Http, HTTPSConnection):
    pass


class Transport:
    """A pool of connections to one server; thread-safe, not fork-safe (the child is given a new one)."""

    def __init__(
        self, url: str, *, connect_timeout_s: float, max_connections: int, headers: Mapping[str, str]
    ) -> None:
        self.url = url
        self._prefix = urlsplit(url).path
        self._connect_timeout_s = connect_timeout_s
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._pool = urllib3.connection_from_url(url, maxsize=max_connections, block=True)
        is_https = isinstance(self._pool, urllib3.HTTPSConnectionPool)
        self._pool.ConnectionCls = _Https if is_https else _Http

    def send(
        self,
        method: str,
        path: str,
        buffers: list[bytes | memoryview] | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Reply:
        """One request and its whole reply, whatever its status.

        Raises:
            Unavailable: no connection, no whole reply, or `deadline` (time.monotonic) passed.
            ProtocolError: the server's certificate is not trusted, or the reply is beyond all size.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise Unavailable(f"{self.url}{path}: timed out", cause="timed out before connecting")
        connect_s = min(self._connect_timeout_s, left_s)
        sent = {**self._headers, **headers}
        body: Any = None
        if buffers is not None:
            body = _Body(buffers, deadline)
            sent["Content-Length"] = str(sum(map(len, buffers)))
        try:
            response = self._pool.urlopen(
                method,
                self._prefix + path,
                body=body,
                headers=sent,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=connect_s, read=left_s),
                pool_timeout=left_s,  # type: ignore[arg-type]  # typed int, passed to queue.get(timeout)
                preload_content=False,
                decode_content=False,
            )
            try:
                data = _read(response, deadline)
                # CPython before 3.13 does not notice the end in read1, and the connection would stay busy
                response.drain_conn()
            except BaseException:
                response.close()
                raise
            finally:
                response.release_conn()  # a closed one as well, or the pool's slot is lost
        except SSLError as error:
            raise ProtocolError(f"{self.url}: TLS failed: {error}") from error
        except (HTTPError, OSError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise Unavailable(f"{self.url}{path}: {cause}", cause=cause) from error
        return Reply(response.status, {name.lower(): value for name, value in response.headers.items()}, data)

    def close(self) -> None:
        """Close the idle connections; those in use close when their request ends."""
        self._pool.close()


def _read(response: BaseHTTPResponse, deadline: float) -> bytearray:
    length = response.headers.get("Content-Length")
    if length is None or not length.isdigit():
        data = bytearray()
        while block := _block(response, _BLOCK, deadline, len(data), None):
            data += block
        return data
    total = int(length)
    if total > MAX_REPLY_BYTES:
        raise ProtocolError(f"a reply of {shown(total)} bytes, limit {MAX_REPLY_BYTES}")
    data = bytearray(total)
    offset = 0
    while offset < total:
        block = _block(response, min(_BLOCK, total - offset), deadline, offset, total)
        if not block:
            raise IncompleteRead(offset, total - offset)
        data[offset : offset + len(block)] = block
        offset += len(block)
    return data


def _block(response: BaseHTTPResponse, size: int, deadline: float, done: int, total: int | None) -> bytes:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(f"timed out after {done} of {total or 'unknown'} bytes of the reply")
    sock = getattr(getattr(response, "connection", None), "sock", None)
    if isinstance(sock, socket.socket):
        sock.settimeout(left_s)
    return response.read1(size)
