"""The way of the bytes: a request body into one buffer, response tensors out as views."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dat_workers.errors import TooLarge

log = logging.getLogger("dat_service")

SLOWEST_BYTES_PER_S = 1_000_000  # what a body may take beside the time every body has


class MalformedBody(ValueError):
    """The body cannot be read as what its headers say (HTTP 400, or 408 when it does not come)."""

    def __init__(self, message: str, field: str, value: object, limit: object, status: int = 400) -> None:
        self.field, self.value, self.limit, self.status = field, value, limit, status
        super().__init__(f"{message}: {field} is {value}, {limit}")


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> memoryview:
    """The whole body in one buffer of the announced length; no chunk is ever joined to another.

    Raises TooLarge before anything is read where the announced length is over `max_bytes`, MalformedBody for a
    length that is no number, a compressed body, and one that is silent for `timeout_s` or takes longer than that
    and a second a megabyte.
    """
    if "upgrade" in request.headers:  # the HTTP parser would take the body for the other protocol's first bytes
        raise MalformedBody("no other protocol is spoken", "Upgrade", request.headers["upgrade"], "must be absent")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise MalformedBody("compressed bodies are not taken", "Content-Encoding", encoding, "must be absent")
    announced = request.headers.get("content-length")
    if announced is None:
        length = None
    elif not (announced.isascii() and announced.isdigit() and len(announced) < 20):
        raise MalformedBody("not a length", "Content-Length", announced[:40], "must be a number of bytes")
    elif int(announced) > max_bytes:
        raise TooLarge("body", f"{announced} bytes", f"at most {max_bytes} bytes")
    else:
        length = int(announced)
    total_s = (max_bytes if length is None else length) / SLOWEST_BYTES_PER_S + timeout_s
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await _read(request, length, max_bytes, Patience(limit, timeout_s, total_s))
    except TimeoutError:
        late = f"silent for {timeout_s:.3g} s, or not whole after {total_s:.3g} s"
        raise MalformedBody("the body came too slowly", "body", late, "send it faster or smaller", 408) from None


class Patience:
    """Puts a timeout off by `silent_s` whenever something moves, but never beyond `total_s` from now."""

    def __init__(self, limit: asyncio.Timeout, silent_s: float, total_s: float) -> None:
        self.limit, self.silent_s = limit, silent_s
        self.clock = asyncio.get_running_loop().time
        self.end = self.clock() + total_s

    def renew(self) -> None:
        self.limit.reschedule(min(self.clock() + self.silent_s, self.end))


async def _read(request: Request, length: int | None, max_bytes: int, patience: Patience) -> memoryview:
    if length is None:
        grown = bytearray()
        async for chunk in request.stream():
            if len(grown) + len(chunk) > max_bytes:
                raise TooLarge("body", f"more than {len(grown)} bytes", f"at most {max_bytes} bytes")
            grown += chunk
            patience.renew()
        return memoryview(grown)
    # not a bytearray: that would be filled with zeros, and so take memory for bytes that never come
    body = np.empty(length, np.uint8).data
    at = 0
    async for chunk in request.stream():
        if at + len(chunk) > length:
            raise MalformedBody("too long", "body", f"{at + len(chunk)} bytes", f"Content-Length says {length}")
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
        patience.renew()
    if at != length:
        raise MalformedBody("truncated", "body", f"{at} bytes", f"Content-Length says {length}")
    return body


class BuffersResponse(Response):
    """A response of several buffers, sent one after the other without being joined.

    `done` is called when all is sent, or the client has gone, or has not read for `timeout_s` and a second a
    megabyte; also where the response is dropped without being sent. It may be called twice.
    """

    def __init__(
        self,
        buffers: Sequence[bytes | memoryview],
        headers: dict[str, str],
        done: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self.done = done
        self.buffers = buffers
        size = sum(len(b) for b in buffers)
        self.within_s = timeout_s + size / SLOWEST_BYTES_PER_S
        kind = "application/octet-stream" if len(buffers) > 1 else "application/json"
        super().__init__(status_code=200, media_type=kind, headers=headers)
        self.headers["content-length"] = str(size)

    def __del__(self) -> None:
        self.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.within_s):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                for i, buffer in enumerate(self.buffers):
                    more = i + 1 < len(self.buffers)
                    await send({"type": "http.response.body", "body": buffer, "more_body": more})
        except TimeoutError:
            log.warning("an answer was not read within %.3g s; the connection is closed", self.within_s)
        finally:
            self.done()
