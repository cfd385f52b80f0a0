"""Turns an error into its HTTP response, with a table of statuses, a table of reasons and one handler."""

from __future__ import annotations

import logging

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import dat_client.wire as wire
from dat_client.wire.headers import RETRY_AFTER
from dat_service.http.auth import InsufficientScope, InvalidKey
from dat_service.http.body import MalformedBody
from dat_service.http.oip import NotServed
from dat_service.observability.records import INCOMPLETE
from dat_workers.errors import DeadlinePassed, EngineError, Full, InvalidInput, OutOfMemory, TooLarge, Unhealthy

log = logging.getLogger("dat_service")

# 4xx means that the request is at fault, 503 that the load is too high or that the replica has no codec, and 500
# that the service is at fault. An HTTPException carries its own status, and so may errors of the first two classes
# (see `status_of`).
STATUSES: dict[type[Exception], int] = {
    wire.WireError: 400, MalformedBody: 400, InvalidKey: 401, InsufficientScope: 403, NotServed: 404,
    TooLarge: 413, InvalidInput: 422, ClientDisconnect: INCOMPLETE, EngineError: 500, Full: 503, Unhealthy: 503,
    OutOfMemory: 503, DeadlinePassed: 504, HTTPException: 500, Exception: 500,
}  # fmt: skip

# The values of the label `reason` of dat_refusals_total. Responses with all other statuses are not refusals.
REASONS = {
    400: "malformed", 401: "key", 403: "scope", 404: "unknown", 405: "method", 408: "slow", 413: "too_large",
    422: "invalid", 429: "full", 503: "full", 504: "deadline",
}  # fmt: skip


def status_of(error: Exception) -> int:
    """Returns the HTTP status of an error: its own status if it has one, else that of its class in STATUSES."""
    if isinstance(error, HTTPException):
        return error.status_code
    own = error.status if isinstance(error, wire.WireError | MalformedBody) else None
    return own or next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def reason_of(error: Exception) -> str | None:
    """Returns the reason of a refusal, as metrics and audit log name it, or None if the error is not a refusal."""
    if isinstance(error, Unhealthy | OutOfMemory):
        return "unhealthy"
    return REASONS.get(status_of(error))


async def on_error(request: Request, error: Exception) -> Response:
    """Returns a response with OIP's error body, including the error's field, value and limit if it has them."""
    status = status_of(error)
    message = str(error)
    headers = {RETRY_AFTER: str(getattr(error, "retry_after_s", 1))} if status == 503 else {}
    match error:
        case InvalidKey():
            headers["WWW-Authenticate"] = "Bearer"
        case MalformedBody():
            headers["Connection"] = "close"  # it is unknown where the next request on this connection begins
        case HTTPException():
            message = f"{request.method} {request.url.path[:200]}: {error.detail}"
            headers = dict(error.headers or {})
        case Unhealthy():
            pass  # this was already logged when the codec failed
        case EngineError():
            log.error("%s", error)
        case _ if status == 500:
            log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
            message = f"internal error: {type(error).__name__}"
    # The audit log gets the message and not the error, because the traceback of an error keeps the body in memory.
    request.state.refusal, request.state.reason = message, reason_of(error)
    field, value, limit = (getattr(error, name, None) for name in ("field", "value", "limit"))
    body = wire.encode_error(message, field, value, limit)
    return Response(body, status, headers, media_type="application/json")
