"""Reads a request body into one buffer, and sends the tensors of a response as views, without copying them."""

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

# A transfer may take its size divided by this number, in seconds, in addition to its timeout.
SLOWEST_BYTES_PER_S = 1_000_000


class MalformedBody(ValueError):
    """The headers of a body are unusable or do not match it (HTTP 400), or it arrives too slowly (HTTP 408)."""

    def __init__(self, message: str, field: str, value: object, limit: object, status: int = 400) -> None:
        self.field, self.value, self.limit, self.status = field, value, limit, status
        super().__init__(f"{message}: {field} is {value}, {limit}")


def announced_length(request: Request, max_bytes: int) -> int | None:
    """Returns the length of the body in bytes as its headers give it, or None for a chunked body.

    Nothing of the body has been read at this time. Raises TooLarge for a length over `max_bytes`, and MalformedBody
    for a length that is not a number, for a compressed body, and for a request to upgrade the protocol.
    """
    if "upgrade" in request.headers:  # the HTTP parser would take the body for bytes of the new protocol
        raise MalformedBody(
            "a change of the protocol is not supported", "Upgrade", request.headers["upgrade"], "must be absent"
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise MalformedBody("compressed bodies are not supported", "Content-Encoding", encoding, "must be absent")
    length = request.headers.get("content-length")
    if length is None:
        return None
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise MalformedBody("unusable length", "Content-Length", length[:40], "must be a number of bytes")
    if int(length) > max_bytes:
        raise TooLarge("body", f"{length} bytes", f"at most {max_bytes} bytes")
    return int(length)


async def read_body(
    request: Request, length: int | None, settings: Settings, grow: Callable[[int], None]
) -> memoryview:
    """Returns the body in one buffer of `length` bytes; each chunk is copied into it once.

    If `length` is None, the buffer grows, and `grow` reserves the bytes of each chunk before the chunk is stored.

    Raises TooLarge if the body is longer than `max_body_bytes`. Raises MalformedBody if its length is not `length`,
    if no byte arrives for `body_timeout_s` seconds, or if the body takes longer than `body_timeout_s` seconds plus
    one second per megabyte received. Only received bytes extend the time, not announced ones. A client that sends
    single bytes therefore holds its reservation for hardly longer than `body_timeout_s`.
    """
    most, silent_s = settings.max_body_bytes, settings.body_timeout_s
    clock = asyncio.get_running_loop().time
    deadline = clock() + silent_s
    grown = bytearray()
    # This is not a bytearray, because a bytearray is filled with zeros, which takes up memory for bytes that may
    # never arrive.
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
                    raise MalformedBody("body too long", "body", f"{end} bytes", f"Content-Length says {length}")
                else:
                    body[received:end] = chunk
                received = end
                deadline += len(chunk) / SLOWEST_BYTES_PER_S
                timeout.reschedule(min(clock() + silent_s, deadline))
    except TimeoutError:
        late = f"paused for {silent_s:.3g} s, or slower than {SLOWEST_BYTES_PER_S} bytes/s after that time"
        raise MalformedBody("the body arrived too slowly", "body", late, "send it faster or smaller", 408) from None
    if length is not None and received != length:
        raise MalformedBody("the body is truncated", "body", f"{received} bytes", f"Content-Length says {length}")
    request.state.body_bytes = received  # for the metrics
    return memoryview(grown) if length is None else body


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. If the client disconnects first, cancels `work` and raises ClientDisconnect."""
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
        # a cancelled task must have ended before the request's reservation is closed
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class TransportMiddleware:
    """ASGI middleware that adds the connection to the ASGI scope of each request that uvicorn itself handles.

    Tensors may be sent as views on such a connection. A request may instead come through Ray Serve's own proxy,
    which HAProxy uses while it finds no replica. That proxy pickles all messages of a response, and views cannot be
    pickled. The connection itself stays in this process and is never pickled.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(receive, "__self__", None)  # uvicorn's RequestResponseCycle
        if type(cycle).__module__.startswith("uvicorn."):
            scope["dat.transport"] = getattr(cycle, "transport", None)
        await self.app(scope, receive, send)


class BuffersResponse(Response):
    """A response that consists of several buffers, which are sent one after the other without being joined.

    The client must read the whole response within `timeout_s` seconds plus one second per megabyte; otherwise its
    connection is cut. `done` is called when all buffers have been sent, when the client has disconnected, when its
    connection has been cut, and when the response is dropped without being sent. `done` may be called twice.
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
                # sending this last, empty message waits until the connection has taken all buffers
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("a client did not read its response within %.3g s and is disconnected", self.within_s)
            if transport is not None:
                with contextlib.suppress(Exception):
                    transport.abort()
        finally:
            self.done()
