"""Reads a request body into one buffer, and sends response tensors as views, without copies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dat_service.settings import Settings
from dat_workers.errors import TooLarge

log = logging.getLogger("dat_service")

T = TypeVar("T")

SLOWEST_BYTES_PER_S = 1_000_000  # a body or a response may take size/this seconds beyond its timeout


class MalformedBody(ValueError):
    """The body does not match its headers (HTTP 400), or does not arrive in time (408)."""

    def __init__(self, message: str, field: str, value: object, limit: object, status: int = 400) -> None:
        self.field, self.value, self.limit, self.status = field, value, limit, status
        super().__init__(f"{message}: {field} is {value}, {limit}")


def announced_length(request: Request, max_bytes: int) -> int | None:
    """Returns the body's length according to its headers, None for a chunked body.

    Raises TooLarge for a length over `max_bytes`, before anything is read, and MalformedBody for a length that is
    not a number, for a compressed body, and for a request to upgrade the protocol.
    """
    if "upgrade" in request.headers:  # the HTTP parser would take the body for the other protocol's first bytes
        raise MalformedBody(
            "no other protocol is supported", "Upgrade", request.headers["upgrade"], "must be absent"
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise MalformedBody("compressed bodies are not supported", "Content-Encoding", encoding, "must be absent")
    length = request.headers.get("content-length")
    if length is None:
        return None
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise MalformedBody("not a length", "Content-Length", length[:40], "must be a number of bytes")
    if int(length) > max_bytes:
        raise TooLarge("body", f"{length} bytes", f"at most {max_bytes} bytes")
    return int(length)


async def read_body(
    request: Request, length: int | None, settings: Settings, grow: Callable[[int], None]
) -> memoryview:
    """Reads the body into one buffer of `length` bytes, into which each chunk is copied once.

    Without a length the buffer grows, and `grow` reserves each chunk's bytes before they are stored. Raises
    TooLarge; raises MalformedBody if nothing arrives for `body_timeout_s`, or if the body takes longer than that
    plus one second per megabyte received. The received bytes count and not the announced ones, so a client that
    sends single bytes keeps its reservation for hardly longer than `body_timeout_s`.
    """
    most, silent_s = settings.max_body_bytes, settings.body_timeout_s
    clock = asyncio.get_running_loop().time
    deadline = clock() + silent_s
    grown = bytearray()
    # not a bytearray: filling it with zeros would take memory for bytes that may never arrive
    body = np.empty(length or 0, np.uint8).data
    received = 0
    try:
        async with asyncio.timeout(silent_s) as timeout:
            async for chunk in request.stream():
                end = received + len(chunk)
                if length is None:
                    if end > most:
                        raise TooLarge("body", f"more than {received} bytes", f"at most {most} bytes")
                    grow(len(chunk))
                    grown += chunk
                elif end > length:
                    raise MalformedBody("too long", "body", f"{end} bytes", f"Content-Length says {length}")
                else:
                    body[received:end] = chunk
                received = end
                deadline += len(chunk) / SLOWEST_BYTES_PER_S
                timeout.reschedule(min(clock() + silent_s, deadline))
    except TimeoutError:
        late = f"silent for {silent_s:.3g} s, or slower than {SLOWEST_BYTES_PER_S} bytes/s after that"
        raise MalformedBody("the body arrived too slowly", "body", late, "send it faster or smaller", 408) from None
    if length is not None and received != length:
        raise MalformedBody("truncated", "body", f"{received} bytes", f"Content-Length says {length}")
    request.state.body_bytes = received  # for the metrics
    return memoryview(grown) if length is None else body


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`; if the client disconnects first, cancels it and raises ClientDisconnect."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        # a cancelled task must have ended before its reservation is closed
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class TransportMiddleware:
    """ASGI middleware that puts the connection into the scope of each request that uvicorn itself handles.

    Tensors may be sent as views on such a connection. Ray Serve's own proxy, to which HAProxy falls back while it
    sees no replica, pickles everything that is sent, and views cannot be pickled. The connection in the scope is
    never pickled: it stays in this process.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(receive, "__self__", None)  # uvicorn's RequestResponseCycle
        if type(cycle).__module__.startswith("uvicorn."):
            scope["dat.transport"] = getattr(cycle, "transport", None)
        await self.app(scope, receive, send)


class BuffersResponse(Response):
    """A response of several buffers, which are sent one after the other without being joined.

    `done` is called when everything was sent, when the client has disconnected, when it has not read everything
    within `timeout_s` plus one second per megabyte (its connection is then cut), and when the response is dropped
    without being sent. It may be called twice.
    """

    def __init__(
        self,
        buffers: Sequence[bytes | memoryview],
        headers: dict[str, str],
        done: Callable[[], None],
        timeout_s: float,
        media_type: str | None = None,
    ) -> None:
        self.done = done
        self.buffers = buffers
        size = sum(len(b) for b in buffers)
        self.within_s = timeout_s + size / SLOWEST_BYTES_PER_S
        kind = "application/octet-stream" if len(buffers) > 1 else "application/json"
        super().__init__(status_code=200, media_type=media_type or kind, headers=headers)
        self.headers["content-length"] = str(size)

    def __del__(self) -> None:
        self.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = scope.get("dat.transport")
        buffers = self.buffers if transport is not None else [bytes(buffer) for buffer in self.buffers]
        try:
            async with asyncio.timeout(self.within_s):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                for buffer in buffers:
                    await send({"type": "http.response.body", "body": buffer, "more_body": True})
                # sending the last, empty message waits until the connection has taken all buffers
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("a response was not read within %.3g s; the connection is cut", self.within_s)
            if transport is not None:
                with contextlib.suppress(Exception):
                    transport.abort()
        finally:
            self.done()
