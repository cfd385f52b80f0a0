"""Implements Transport over HTTP (Open Inference Protocol v2), with one HTTP request for each attempt of a call."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from dat_client import errors, wire
from dat_client.calls.answers import MOST_JSON_BYTES, most_reply_bytes, read_response
from dat_client.calls.core import Call, Exchange, new_id
from dat_client.errors import DatError, ProtocolError, Unavailable, invalid, sentence, shown
from dat_client.transports.base import Question
from dat_client.transports.connections import Connections, Reply
from dat_client.wire.headers import (
    ATTEMPT,
    HEADER_LENGTH,
    REQUEST_ID,
    RETRY_AFTER,
    SERVER_TIMING,
    parse_server_timing,
    retry_after_s,
)


def check_url(url: str) -> str:
    """Returns `url` without a trailing slash; raises InvalidRequest if it is not the base URL of a service.

    >>> check_url("http://codec:8000/prefix/")
    'http://codec:8000/prefix'
    """
    parts, hint = urlsplit(""), None
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        parts.port  # noqa: B018  (raises for a bad one)
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        hint = str(error)
    if parts.username is not None:  # the password is not shown
        raise invalid("url", "without user and password", found="a URL with them", hint="pass a key as api_key")
    if re.search(r"[\x00-\x20\x7f]", str(url)) or not parts.path.isascii():
        hint = "percent-encode blanks, control characters and non-ASCII characters"
    elif parts.query or parts.fragment:
        hint = "remove the query (?...) and the fragment (#...)"
    if hint or parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid("url", "http://host:port or https://host:port/prefix", value=url, hint=hint)
    return url.rstrip("/")


class HttpTransport:
    """Sends the calls of a Client to a codec over HTTP; its methods are described at `Transport`."""

    def __init__(
        self, url: str, codec: str, *, connect_timeout_s: float, max_connections: int, headers: Mapping[str, str]
    ) -> None:
        self.url = url
        self._prefix = urlsplit(url).path
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._connections = Connections(url, connect_timeout_s=connect_timeout_s, limit=max_connections)
        path = f"/v2/models/{quote(codec, safe='')}"
        self._paths = {
            "infer": f"{path}/infer",
            "live": "/v2/health/live",
            "ready": f"{path}/ready",
            "metadata": path,
            "server_metadata": "/v2",
        }

    def address(self, target: Question | Literal["infer"]) -> str:
        """Returns the URL of a question or of inference."""
        return self.url + self._paths[target]

    def prepare(self, call: Call) -> Callable[[float, int], Exchange]:
        """Encodes the call once and returns `attempt(deadline, number)`, which sends it and returns its answer."""
        buffers, header_length = call.encode()
        size, most_bytes = sum(map(len, buffers)), most_reply_bytes(call)
        call_headers = {
            "Content-Type": "application/octet-stream",
            HEADER_LENGTH: str(header_length),
            "Content-Length": str(size),
            REQUEST_ID: call.id,
        }

        def attempt(deadline: float, number: int) -> Exchange:
            begun_s = time.perf_counter()
            attempt_headers = {**call_headers, ATTEMPT: str(number)}
            reply = self._send("POST", "infer", attempt_headers, buffers, deadline, most_bytes)
            seconds = time.perf_counter() - begun_s
            timing = parse_server_timing(reply.header(SERVER_TIMING))
            response = read_response(call, reply.body, reply.header(HEADER_LENGTH))
            return Exchange(response, timing, begun_s, seconds, size, len(reply.body))

        return attempt

    def ask(self, question: Question, deadline: float, number: int = 1) -> dict[str, Any]:
        """Sends a question once and returns the JSON object of its answer.

        For `live` and `ready` it returns {} if the body is anything else. Raises ProtocolError if the body of
        `metadata` or `server_metadata` is not a JSON object, and the exceptions of `_send`.
        """
        question_headers = {REQUEST_ID: new_id(), ATTEMPT: str(number)}
        reply = self._send("GET", question, question_headers, (), deadline, MOST_JSON_BYTES)
        try:
            answer = json.loads(bytes(reply.body))
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            return answer
        if question in ("live", "ready"):  # in OIP v2 the status alone is the answer to these
            return {}
        start = shown(bytes(reply.body[:80]))
        raise ProtocolError(f"{self.address(question)}: the answer is not a JSON object; it begins with {start}")

    def _send(
        self,
        method: str,
        target: Question | Literal["infer"],
        headers: Mapping[str, str],
        buffers: Sequence[bytes | memoryview],
        deadline: float,
        most_bytes: int,
    ) -> Reply:
        """Sends a request and returns its reply, of at most `most_bytes`, if the status is 200.

        Raises the exception of `error_of` for any other status, Unavailable if no whole reply arrives, and
        ProtocolError for a reply that is too long or compressed.
        """
        try:
            path = self._prefix + self._paths[target]
            all_headers = {**self._headers, **headers}
            reply = self._connections.request(method, path, all_headers, buffers, deadline, most_bytes)
        except ProtocolError as error:
            raise ProtocolError(f"{self.address(target)}: {error}") from error
        except (HTTPException, OSError) as error:
            cause = sentence(f"{type(error).__name__}: {error}")
            raise Unavailable(f"{self.address(target)}: {cause}", cause=cause) from error
        refusal = error_of(reply, self.address(target))
        if refusal is not None:
            raise refusal
        if (encoding := reply.header("content-encoding") or "identity") != "identity":
            problem = f"Content-Encoding is {shown(encoding)}, though the request accepts identity alone"
            raise ProtocolError(f"{self.address(target)}: {problem}; is there a proxy that compresses?")
        return reply

    def close(self) -> None:
        """Closes the idle connections now, and each connection in use as soon as its request ends."""
        self._connections.close()


def error_of(reply: Reply, url: str) -> DatError | None:
    """Returns the exception that corresponds to the status of a reply, or None if the status is 200.

    No other status is a success: the service sends none, and 206 for example says that a part is missing.
    """
    status = reply.status
    if status == 200:
        return None
    if 300 <= status < 400:
        location = sentence(reply.header("location") or "another address, which it does not name")
        return errors.ProtocolError(f"{url}: {status}: the server redirects to {location}; use that address")
    if not 400 <= status < 600:
        problem = "no inference service answers with this status; check the URL, and the proxies on the way"
        return errors.ProtocolError(f"{url}: {status}: {problem}")
    body = wire.decode_error(reply.body)
    if body is None:
        return _error_of_other_server(reply, url)
    message = f"{url}: {status}: {sentence(body.error)}"
    pause_s = retry_after_s(reply.header(RETRY_AFTER), time.time())
    if status == 429 or (status == 503 and pause_s is not None):
        return errors.Overloaded(message, cause=message, status=status, retry_after_s=pause_s)
    if status == 408 or status >= 500:
        return errors.Unavailable(message, cause=message, status=status)
    if status in (401, 403):
        return errors.Unauthorized(f"{message} (check the api_key of the Client)", status=status)
    kinds: dict[int, type[errors.InvalidRequest]] = {404: errors.UnknownCodec, 413: errors.TooLarge}
    kind = kinds.get(status, errors.InvalidRequest)
    return kind(message, field=body.field, value=body.value, limit=body.limit, status=status)


# With these statuses a proxy refuses the request itself, whatever server stands behind the proxy.
REFUSED_BY_PROXIES: dict[int, type[DatError]] = {
    400: errors.InvalidRequest, 401: errors.Unauthorized, 403: errors.Unauthorized, 411: errors.InvalidRequest,
    413: errors.TooLarge, 414: errors.InvalidRequest, 415: errors.InvalidRequest, 422: errors.InvalidRequest,
    426: errors.InvalidRequest, 431: errors.InvalidRequest,
}  # fmt: skip


def _error_of_other_server(reply: Reply, url: str) -> DatError:
    """Returns the exception for an answer that lacks OIP's error body, so that a proxy or another server gave it.

    While a service is restarted or moved, what stands in front of it or takes its port may answer anything, for
    example 404. That says nothing about the service, so it counts as a lost connection and is repeated.
    """
    status, server = reply.status, reply.header("server")
    name = f"a server that calls itself {shown(server)}" if server else "a server without a name"
    text = bytes(reply.body[:200]).decode("utf-8", "replace")
    start = f"begins with {shown(text)}" if text else "is empty"
    message = f"{url}: {status} from {name}, not from an inference service; its answer {start}"
    if status in REFUSED_BY_PROXIES:
        return REFUSED_BY_PROXIES[status](message, status=status)
    pause_s = retry_after_s(reply.header(RETRY_AFTER), time.time())
    if status == 429 or (status == 503 and pause_s is not None):
        return errors.Overloaded(message, cause=message, retry_after_s=pause_s)
    message += "; if the service is running, check the URL"
    return errors.Unavailable(message, cause=message, status=408 if status == 408 else None)
