"""The way of the bytes: a request body into one buffer, response tensors out as views."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dat_workers.errors import TooLarge


class MalformedBody(ValueError):
    """The body cannot be read as what its headers say (HTTP 400, or 408 when it does not come)."""

    def __init__(self, message: str, field: str, value: object, limit: object, status: int = 400) -> None:
        self.field, self.value, self.limit, self.status = field, value, limit, status
        super().__init__(f"{message}: {field} is {value}, {limit}")


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytearray:
    """The whole body in one buffer of the announced length; no chunk is ever joined to another.

    Raises TooLarge before anything is read where the announced length is over `max_bytes`, MalformedBody for a
    length that is no number, a compressed body, or bytes that stay away for `timeout_s`.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise MalformedBody("compressed bodies are not taken", "Content-Encoding", encoding, "must be absent")
    announced = request.headers.get("content-length")
    if announced is None:
        return await _read_unannounced(request, max_bytes, timeout_s)
    if not (announced.isascii() and announced.isdigit() and len(announced) < 20):
        raise MalformedBody("not a length", "Content-Length", announced[:40], "must be a number of bytes")
    if int(announced) > max_bytes:
        raise TooLarge("body", f"{announced} bytes", f"at most {max_bytes} bytes")
    body = bytearray(int(announced))
    at = 0
    async for chunk in _chunks(request, timeout_s):
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
    if at != len(body):
        raise MalformedBody("truncated", "body", f"{at} bytes", f"Content-Length says {announced}")
    return body


async def _read_unannounced(request: Request, max_bytes: int, timeout_s: float) -> bytearray:
    body = bytearray()
    async for chunk in _chunks(request, timeout_s):
        if len(body) + len(chunk) > max_bytes:
            raise TooLarge("body", f"more than {len(body)} bytes", f"at most {max_bytes} bytes")
        body += chunk
    return body


async def _chunks(request: Request, timeout_s: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), timeout_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            silent = f"silent for {timeout_s:g} s"
            raise MalformedBody("the body stopped coming", "body", silent, "send it whole", 408) from None
        yield chunk


class BuffersResponse(Response):
    """A response of several buffers, sent one after the other without being joined."""

    def __init__(self, buffers: Sequence[bytes | memoryview], headers: dict[str, str]) -> None:
        super().__init__(status_code=200, media_type="application/octet-stream", headers=headers)
        self.buffers = buffers
        self.headers["content-length"] = str(sum(len(b) for b in buffers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for i, buffer in enumerate(self.buffers):
            more = i + 1 < len(self.buffers)
            await send({"type": "http.response.body", "body": buffer, "more_body": more})
