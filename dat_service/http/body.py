"""The way of the bytes: a request body into one buffer, response tensors out as views."""

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

from dat_workers.errors import TooLarge

log = logging.getLogger("dat_service")

T = TypeVar("T")

SLOWEST_BYTES_PER_S = 1_000_000  # what a body may take beside the time every body has


class MalformedBody(ValueError):
    """The body cannot be read as what its headers say (HTTP 400, or 408 when it does not come)."""

    def __init__(self, message: str, field: str, value: object, limit: object, status: int = 400) -> None:
        self.field, self.value, self.limit, self.status = field, value, limit, status
        super().__init__(f"{message}: {field} is {value}, {limit}")


def announced_length(request: Request, max_bytes: int) -> int | None:
    """The length that the headers announce, None for a body in chunks.

    Raises TooLarge where it is over `max_bytes`, before anything is read, and MalformedBody for a length that is no
    number, and for a compressed body.
    """
    if "upgrade" in request.headers:  # the HTTP parser would take the body for the other protocol's first bytes
        raise MalformedBody("no other protocol is spoken", "Upgrade", request.headers["upgrade"], "must be absent")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise MalformedBody("compressed bodies are not taken", "Content-Encoding", encoding, "must be absent")
    announced = request.headers.get("content-length")
    if announced is None:
        return None
    if not (announced.isascii() and announced.isdigit() and len(announced) < 20):
        raise MalformedBody("not a length", "Content-Length", announced[:40], "must be a number of bytes")
    if int(announced) > max_bytes:
        raise TooLarge("body", f"{announced} bytes", f"at most {max_bytes} bytes")
    return int(announced)


async def read_body(
    request: Request, length: int | None, *, max_bytes: int, timeout_s: float, grow: Callable[[int], None]
) -> memoryview:
    """The whole body in one buffer of the announced `length`; no chunk is ever joined to another.

    Without a length `grow` is told of each chunk's bytes before they are kept. Raises TooLarge, and MalformedBody
    for a body that is silent for `timeout_s`, or takes longer than that and a second for each megabyte that came.
    """
    try:
        async with asyncio.timeout(timeout_s) as limit:
            body = await _read(request, length, max_bytes, grow, Patience(limit, timeout_s))
            request.state.body_bytes = len(body)  # for the metrics
            return body
    except TimeoutError:
        late = f"silent for {timeout_s:.3g} s, or slower than {SLOWEST_BYTES_PER_S} bytes/s after that"
        raise MalformedBody("the body came too slowly", "body", late, "send it faster or smaller", 408) from None


class Patience:
    """Puts a timeout off by `silent_s` whenever something moves, and not beyond what the bytes received may take.

    By what was received, not by what was announced: who trickles holds its bytes for hardly more than `silent_s`.
    """

    def __init__(self, limit: asyncio.Timeout, silent_s: float) -> None:
        self.limit, self.silent_s = limit, silent_s
        self.clock = asyncio.get_running_loop().time
        self.end = self.clock() + silent_s

    def renew(self, nbytes: int) -> None:
        self.end += nbytes / SLOWEST_BYTES_PER_S
        self.limit.reschedule(min(self.clock() + self.silent_s, self.end))


async def _read(
    request: Request, length: int | None, max_bytes: int, grow: Callable[[int], None], patience: Patience
) -> memoryview:
    if length is None:
        grown = bytearray()
        async for chunk in request.stream():
            if len(grown) + len(chunk) > max_bytes:
                raise TooLarge("body", f"more than {len(grown)} bytes", f"at most {max_bytes} bytes")
            grow(len(chunk))
            grown += chunk
            patience.renew(len(chunk))
        return memoryview(grown)
    # not a bytearray: that would be filled with zeros, and so take memory for bytes that never come
    body = np.empty(length, np.uint8).data
    at = 0
    async for chunk in request.stream():
        if at + len(chunk) > length:
            raise MalformedBody("too long", "body", f"{at + len(chunk)} bytes", f"Content-Length says {length}")
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
        patience.renew(len(chunk))
    if at != length:
        raise MalformedBody("truncated", "body", f"{at} bytes", f"Content-Length says {length}")
    return body


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled, and ClientDisconnect raised, where the client leaves before."""
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
        # a cancelled task must end before what it uses is let go
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Direct:
    """ASGI middleware that notes whether uvicorn itself carries the request, and by which connection.

    Views of tensors may be sent there. Ray Serve's own proxy, to which HAProxy falls back while it sees no replica,
    pickles what is sent, and views cannot be pickled. (Nothing noted here is pickled: this side of it is the last.)
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        carrier = getattr(receive, "__self__", None)
        if type(carrier).__module__.startswith("uvicorn."):
            scope["dat.transport"] = getattr(carrier, "transport", None)
        await self.app(scope, receive, send)


class BuffersResponse(Response):
    """A response of several buffers, sent one after the other without being joined.

    `done` is called when all is sent, or the client has gone, or has not read for `timeout_s` and a second a
    megabyte (then its connection is cut); also where the response is dropped without being sent. It may be called
    twice.
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
                # this one waits until the connection has taken what went before
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("an answer was not read within %.3g s; the connection is cut", self.within_s)
            if transport is not None:
                with contextlib.suppress(Exception):
                    transport.abort()
        finally:
            self.done()
