"""Takes a request for the codec through all its steps: admission, reading the body, computation and response."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response

from dat_client.errors import shown
from dat_client.wire.headers import CLIENT_ID, SERVER_TIMING, TIMEOUT_MS, format_server_timing
from dat_service.http.body import BuffersResponse, announced_length, read_body, while_connected
from dat_service.inference import Answer, Caller
from dat_service.worker import CodecWorker, Reservation
from dat_workers.errors import InvalidInput


@dataclass(frozen=True)
class Reply:
    """The body of a response, as a list of buffers, and the answer that the body encodes."""

    buffers: Sequence[bytes | memoryview]
    answer: Answer
    headers: dict[str, str] = field(default_factory=dict)
    media_type: str | None = None


Compute = Callable[[memoryview, Caller, Reservation], Coroutine[Any, Any, Reply]]


async def exchange(request: Request, worker: CodecWorker, compute: Compute) -> Response:
    """Admits a request, reads its body, calls `compute` on the body, and returns the response.

    If the client disconnects, the computation is cancelled and ClientDisconnect is raised. The seconds that each
    stage took go into the Server-Timing header, and into `request.state.stage_seconds` for the spans.
    """
    started = time.monotonic()
    settings = worker.settings
    length = announced_length(request, settings.max_body_bytes)
    caller = caller_of(request, started)
    with ExitStack() as stack:
        reservation = stack.enter_context(worker.admit(caller.holder, length or 0))
        body = await read_body(request, length, settings, reservation.grow)
        reservation.take_slot()
        body_s = time.monotonic() - started
        reply = await while_connected(request, compute(body, caller, reservation))
        stages = {"body": body_s, "queue": reply.answer.queue_s, "codec": reply.answer.codec_s}
        request.state.stage_seconds = stages
        timing = format_server_timing(stages | {"total": time.monotonic() - started})
        # The reservation is closed when the response has been sent: until then, the response takes up memory.
        done = stack.pop_all().close
    return BuffersResponse(reply.buffers, reply.headers | {SERVER_TIMING: timing}, done, settings, reply.media_type)


def caller_of(request: Request, started: float) -> Caller:
    """Returns the caller of a request. The deadline is X-Dat-Timeout-Ms milliseconds after `started`.

    Raises InvalidInput if that header is not a number of milliseconds. Any client may send any name as
    X-Dat-Client, so that header affects only the order in the queue. Slots and bytes are charged to the API key, or
    to the address of the client if it has no key.
    """
    timeout_ms = request.headers.get(TIMEOUT_MS)
    deadline = None
    if timeout_ms is not None:
        if not (timeout_ms.isascii() and timeout_ms.isdigit() and len(timeout_ms) < 12):
            raise InvalidInput(TIMEOUT_MS, shown(timeout_ms), "a whole number of milliseconds, below 10^11")
        deadline = started + int(timeout_ms) / 1000
    address = request.client.host if request.client else ""
    if request.app.state.behind_proxy:
        # HAProxy replaces the client's header by its own; without HAProxy, a client could put any text into it.
        address = request.headers.get("x-forwarded-for", address)
    key_id = getattr(request.state, "key_id", "")
    holder = f"key/{key_id}" if key_id else f"peer/{address[:64]}"
    return Caller(f"{key_id}/{request.headers.get(CLIENT_ID, address)[:64]}", deadline, holder)
