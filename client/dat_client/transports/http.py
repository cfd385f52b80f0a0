"""The way over HTTP: Open Inference Protocol v2, one request a call."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from dat_client.calls.core import Call, Exchange, Reply, error_of, next_id, read_response
from dat_client.errors import InvalidRequest, ProtocolError, Unavailable, shown
from dat_client.transports.connections import Connections
from dat_client.wire.headers import ATTEMPT, HEADER_LENGTH, REQUEST_ID, SERVER_TIMING, parse_server_timing


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
        (parts.hostname or "").encode("idna")
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
    if re.search(r"[\x00-\x20\x7f]", url) or not parts.path.isascii():
        raise refuse("no blanks, and in the path only ASCII (percent-encode the rest)")
    return url.rstrip("/")


def codec_path(codec: str) -> str:
    """The path of a codec, its name percent-encoded.

    >>> codec_path("a/b c")
    '/v2/models/a%2Fb%20c'
    """
    return f"/v2/models/{quote(codec, safe='')}"


class HttpWay:
    """A codec behind a URL; thread-safe, not fork-safe (the child is given a new one)."""

    def __init__(
        self, url: str, codec: str, *, connect_timeout_s: float, max_connections: int, headers: Mapping[str, str]
    ) -> None:
        self.url = url
        self._prefix = urlsplit(url).path
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._connections = Connections(url, connect_timeout_s=connect_timeout_s, limit=max_connections)
        path = codec_path(codec)
        self._infer = f"{path}/infer"
        self._paths = {
            "live": "/v2/health/live",
            "ready": f"{path}/ready",
            "metadata": path,
            "server_metadata": "/v2",
        }

    def address(self, what: str) -> str:
        """Where a question, or "infer", goes, for messages."""
        return self.url + self._paths.get(what, self._infer)

    def sending(self, call: Call) -> Callable[[float, int], Exchange]:
        """The attempt that `repeat` makes: `call` is encoded here, once, and sent at each attempt."""
        buffers, header_length = call.encode()
        headers = {
            "Content-Type": "application/octet-stream",
            HEADER_LENGTH: str(header_length),
            "Content-Length": str(sum(map(len, buffers))),
            REQUEST_ID: call.id,
        }

        def attempt(deadline: float, number: int) -> Exchange:
            begun_s = time.perf_counter()
            sent = {**headers, ATTEMPT: str(number)}
            reply = self._send("POST", self._infer, sent, buffers, deadline)
            seconds = time.perf_counter() - begun_s
            timing = parse_server_timing(reply.header(SERVER_TIMING))
            response = read_response(call, reply)
            return Exchange(response, timing, begun_s, seconds, sum(map(len, buffers)), len(reply.body))

        return attempt

    def ask(self, what: str, deadline: float, number: int = 1) -> dict[str, Any]:
        """The answer to "live", "ready", "metadata" or "server_metadata"; raises as `Client.metadata`."""
        headers = {REQUEST_ID: next_id(), ATTEMPT: str(number)}
        reply = self._send("GET", self._paths[what], headers, (), deadline)
        try:
            answer = json.loads(bytes(reply.body))
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            return answer
        if what in ("live", "ready"):  # in OIP v2 the status says it
            return {}
        start = shown(bytes(reply.body[:80]))
        raise ProtocolError(f"{self.address(what)}: the answer is not a JSON object, begins with {start}")

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        buffers: Sequence[bytes | memoryview],
        deadline: float,
    ) -> Reply:
        """A 2xx reply. Raises Unavailable, and what another status means."""
        try:
            target = self._prefix + path
            reply = self._connections.request(method, target, {**self._headers, **headers}, buffers, deadline)
        except (HTTPException, OSError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise Unavailable(f"{self.url}{path}: {cause}", cause=cause) from error
        refusal = error_of(reply, self.url + path)
        if refusal is not None:
            raise refusal
        return reply

    def close(self) -> None:
        """Close the idle connections; those in use close when their request ends."""
        self._connections.close()
