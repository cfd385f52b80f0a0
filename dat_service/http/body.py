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

from dat_client.errors import shown
from dat_client.wire.headers import HEADER_LENGTH, TIMEOUT_MS
from dat_service.settings import Settings
from dat_workers.errors import TooLarge
from dat_workers.system.text import duration

log = logging.getLogger("dat_service")

T = TypeVar("T")

CHECK_EVERY_S = 0.5  # how often it is looked up what a client has read of its response


class Pace:
    """The time until which a transfer may pause: a client may pause, but on average must keep a least rate.

    A transfer begins with `pause_s` seconds. Each byte adds the time that it takes at `least_rate` bytes per
    second, up to `pause_s` seconds from then. So a client that is fast at first cannot pause for long later.

    >>> pace = Pace(0.0, pause_s=15.0, least_rate=1000)
    >>> pace.moved(2.0, 5000), pace.moved(9.0, 1000)
    (17.0, 18.0)
    """

    def __init__(self, now: float, pause_s: float, least_rate: float) -> None:
        self.pause_s, self.least_rate = pause_s, least_rate
        self.until = now + pause_s

    def moved(self, now: float, nbytes: int) -> float:
        """Notes that `nbytes` bytes have been transferred, and returns the time until which there must be more."""
        self.until = min(self.until + nbytes / self.least_rate, now + self.pause_s)
        return self.until


class MalformedBody(ValueError):
    """The headers of a body are unusable or do not match it (HTTP 400), or it arrives too slowly (HTTP 408)."""

    def __init__(self, message: str, field: str, value: object, limit: object, status: int = 400) -> None:
        self.field, self.value, self.limit, self.status = field, value, limit, status
        super().__init__(f"{message}: {field} is {value}, {limit}")


# Headers that must not be repeated: programs disagree about which of several counts.
SINGLE_HEADERS = (
    "host", "content-length", "content-encoding", "authorization", HEADER_LENGTH.lower(), TIMEOUT_MS.lower(),
)  # fmt: skip


async def check_headers(request: Request) -> None:
    """Raises MalformedBody for an HTTP/1.1 request without Host (RFC 9112, 3.2), and for a repeated header."""
    if request.scope.get("http_version") == "1.1" and "host" not in request.headers:
        raise MalformedBody("the request is not valid HTTP/1.1", "Host", "absent", "must be given once")
    for name in SINGLE_HEADERS:
        if len(values := request.headers.getlist(name)) > 1:
            shown_values = shown(values) if name != "authorization" else f"given {len(values)} times"
            raise MalformedBody("a header is repeated", name.title(), shown_values, "must be given once")


def announced_length(request: Request, max_bytes: int) -> int | None:
    """Returns the length of the body in bytes as its headers give it, or None for a chunked body.

    Nothing of the body has been read at this time. Raises TooLarge for a length over `max_bytes`, and MalformedBody
    for a length that is not a number, for a compressed body, and for a request to upgrade the protocol.
    """
    if "upgrade" in request.headers:  # the HTTP parser would take the body for bytes of the new protocol
        raise MalformedBody(
            "a change of the protocol is not supported",
            "Upgrade",
            shown(request.headers["upgrade"]),
            "must be absent",
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise MalformedBody(
            "compressed bodies are not supported", "Content-Encoding", shown(encoding), "must be absent"
        )
    # The HTTP parser ignores codings other than chunked, and so would take packed bytes for the body.
    transfer = ", ".join(request.headers.getlist("transfer-encoding")).lower()
    if transfer not in ("", "chunked"):
        raise MalformedBody(
            "compressed bodies are not supported", "Transfer-Encoding", shown(transfer), "must be chunked or absent"
        )
    length = request.headers.get("content-length")
    if length is None:
        return None
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise MalformedBody("unusable length", "Content-Length", shown(length), "must be a number of bytes")
    if int(length) > max_bytes:
        raise TooLarge("body", f"{length} bytes", f"at most {max_bytes} bytes")
    return int(length)


async def read_body(
    request: Request, length: int | None, settings: Settings, grow: Callable[[int], None]
) -> memoryview:
    """Returns the body in one buffer of `length` bytes; each chunk is copied into it once.

    If `length` is None, the buffer grows. `grow` reserves the bytes of each chunk before the chunk is stored.

    Raises TooLarge if the body is longer than `max_body_bytes`, and the errors of `grow`. Raises MalformedBody if
    its length is not `length`, and if it arrives more slowly than `Pace` allows. Only received bytes extend the
    time, not announced ones.
    """
    most = settings.max_body_bytes
    clock = asyncio.get_running_loop().time
    began = clock()
    pace = Pace(began, settings.body_timeout_s, settings.min_body_rate)
    grown = bytearray()
    body = memoryview(b"")
    received = 0
    try:
        async with asyncio.timeout_at(pace.until) as timeout:
            async for chunk in request.stream():
                end = received + len(chunk)
                if end > most:
                    raise TooLarge("body", f"more than {received} bytes", f"at most {most} bytes")
                if length is not None and end > length:
                    raise MalformedBody("body too long", "body", f"{end} bytes", f"Content-Length says {length}")
                grow(len(chunk))
                if length is None:
                    grown += chunk
                else:
                    if not received:
                        # This is not a bytearray, because a bytearray is filled with zeros, which takes up memory
                        # for bytes that may never arrive.
                        body = np.empty(length, np.uint8).data
                    body[received:end] = chunk
                received = end
                timeout.reschedule(pace.moved(clock(), len(chunk)))
    except TimeoutError:
        raise too_slow(received, length, clock() - began, settings) from None
    if length is not None and received != length:
        raise MalformedBody("the body is truncated", "body", f"{received} bytes", f"Content-Length says {length}")
    request.state.body_bytes = received  # for the metrics
    return memoryview(grown) if length is None else body


def too_slow(received: int, length: int | None, seconds: float, settings: Settings) -> MalformedBody:
    """Returns the error for a body that arrived too slowly. It says what the client and the operator can do."""
    announced = "" if length is None else f" of {length}"
    return MalformedBody(
        "the body arrived too slowly",
        "body",
        f"{received}{announced} bytes in {seconds:.1f} s",
        f"at least {settings.min_body_rate} bytes per second after pauses of {duration(settings.body_timeout_s)} "
        "together; send fewer images in each request, or smaller ones (files instead of pixels, gradients as "
        "INT8); the operator of the service can lower DAT_MIN_BODY_RATE",
        408,
    )


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

    The client must read as fast as `Pace` demands; otherwise its connection is cut. `done` is called when all
    buffers have been sent, when the client has disconnected, when its connection has been cut, and when the
    response is dropped without being sent. `done` may be called twice.
    """

    def __init__(
        self,
        buffers: Sequence[bytes | memoryview],
        headers: dict[str, str],
        done: Callable[[], None],
        settings: Settings,
        media_type: str | None = None,
    ) -> None:
        self.done = done
        self.buffers = buffers
        self.settings = settings
        self.size = sum(len(b) for b in buffers)
        kind = "application/octet-stream" if len(buffers) > 1 else "application/json"
        super().__init__(status_code=200, media_type=media_type or kind, headers=headers)
        self.headers["content-length"] = str(self.size)

    def __del__(self) -> None:
        self.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport: Any = scope.get("dat.transport")
        buffers = self.buffers if transport is not None else [bytes(buffer) for buffer in self.buffers]
        loop = asyncio.get_running_loop()
        began = loop.time()
        pace = Pace(began, self.settings.body_timeout_s, self.settings.min_body_rate)
        unread, timer = self.size, None
        try:
            async with asyncio.timeout_at(pace.until) as timeout:

                def look() -> None:
                    """Notes what the client has read since the last look; asks again after CHECK_EVERY_S."""
                    nonlocal unread, timer
                    if timeout.expired() or transport.is_closing():
                        return
                    before, unread = unread, min(unread, transport.get_write_buffer_size() + unsent)
                    timeout.reschedule(pace.moved(loop.time(), before - unread))
                    timer = loop.call_later(CHECK_EVERY_S, look)

                unsent = self.size
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if transport is None:  # Serve's proxy reads; how fast the client does is unknown
                    timeout.reschedule(pace.until + self.size / pace.least_rate)
                else:
                    timer = loop.call_later(CHECK_EVERY_S, look)
                for buffer in buffers:
                    unsent -= len(buffer)
                    await send({"type": "http.response.body", "body": buffer, "more_body": True})
                # sending this last, empty message waits until the connection has taken all buffers
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning(
                "a client read %d of the %d bytes of its response in %.1f s, which is slower than min_body_rate=%d "
                "bytes per second, and is disconnected",
                self.size - unread, self.size, loop.time() - began, self.settings.min_body_rate,
            )  # fmt: skip
            if transport is not None:
                with contextlib.suppress(Exception):
                    transport.abort()
        finally:
            if timer is not None:
                timer.cancel()
            self.done()
