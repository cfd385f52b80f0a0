"""The one path of a request for the codec: admission, body, computation, response."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response

from dat_client.wire.headers import CLIENT_ID, SERVER_TIMING, TIMEOUT_MS, format_server_timing
from dat_service.http.body import BuffersResponse, announced_length, read_body, while_connected
from dat_service.inference import Answer, Caller
from dat_service.worker import CodecWorker, Reservation
from dat_workers.errors import InvalidInput


@dataclass(frozen=True)
class Reply:
    """The body of a response, in buffers, and the answer that it was made of."""

    buffers: Sequence[bytes | memoryview]
    answer: Answer
    headers: dict[str, str] = field(default_factory=dict)
    media_type: str | None = None


Compute = Callable[[memoryview, Caller, Reservation], Coroutine[Any, Any, Reply]]


async def exchange(request: Request, worker: CodecWorker, compute: Compute) -> Response:
    """Admits a request, reads its body, computes the reply while the client stays connected, and returns it.

    The seconds of each stage go into a Server-Timing header, and into `request.state.stage_seconds` for the spans.
    """
    started = time.monotonic()
    settings = worker.settings
    length = announced_length(request, settings.max_body_bytes)
    caller = caller_of(request, started)
    with ExitStack() as stack:
        reservation = stack.enter_context(worker.admit(caller.holder, length or 0))
        body = await read_body(request, length, settings, reservation.grow)
        body_s = time.monotonic() - started
        reply = await while_connected(request, compute(body, caller, reservation))
        stages = {"body": body_s, "queue": reply.answer.queue_s, "codec": reply.answer.codec_s}
        request.state.stage_seconds = stages
        timing = format_server_timing(stages | {"total": time.monotonic() - started})
        # The reservation is kept until the response is sent: a client that reads slowly holds its memory as long.
        done = stack.pop_all().close
    return BuffersResponse(
        reply.buffers, reply.headers | {SERVER_TIMING: timing}, done, settings.body_timeout_s, reply.media_type
    )


def caller_of(request: Request, started: float) -> Caller:
    """Returns the caller, with the deadline that X-Dat-Timeout-Ms sets, counted from `started`.

    Raises InvalidInput if the header is not a time. X-Dat-Client is a name that anybody may make up, so it only
    decides about the order in the queue; slots and bytes are held by API key, else by address.
    """
    timeout_ms = request.headers.get(TIMEOUT_MS)
    deadline = None
    if timeout_ms is not None:
        if not (timeout_ms.isascii() and timeout_ms.isdigit() and len(timeout_ms) < 12):
            raise InvalidInput(TIMEOUT_MS, repr(timeout_ms), "a whole number of milliseconds, below 10^11")
        deadline = started + int(timeout_ms) / 1000
    address = request.client.host if request.client else ""
    if request.app.state.behind_proxy:
        # HAProxy writes this header in place of the client's; without HAProxy it may say anything.
        address = request.headers.get("x-forwarded-for", address)
    key_id = getattr(request.state, "key_id", "")
    holder = f"key/{key_id}" if key_id else f"peer/{address[:64]}"
    return Caller(f"{key_id}/{request.headers.get(CLIENT_ID, address)[:64]}", deadline, holder)
