"""Each error has its status and its reason."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import dat_client.wire as wire
from dat_service.http.auth import InsufficientScope, InvalidKey
from dat_service.http.body import MalformedBody
from dat_service.http.errors import reason_of, status_of
from dat_service.http.oip import NotServed
from dat_workers.errors import DeadlinePassed, EngineError, Full, InvalidInput, OutOfMemory, TooLarge, Unhealthy


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (wire.WireError("not JSON", "body", 1, malformed=True), 400, "malformed"),
        (wire.WireError("not a dtype", "images", 1), 422, "invalid"),
        (MalformedBody("truncated", "body", 1, 2), 400, "malformed"),
        (MalformedBody("slow", "body", 1, 2, 408), 408, "slow"),
        (InvalidKey("no key"), 401, "key"),
        (InsufficientScope("admin only"), 403, "scope"),
        (NotServed("codec", "a", "b"), 404, "unknown"),
        (HTTPException(404), 404, "unknown"),
        (HTTPException(405), 405, "method"),
        (InvalidInput("images", 1, "2"), 422, "invalid"),
        (TooLarge("images", 1, "2"), 413, "too_large"),
        (Full("64 requests are held", "at most 64", 1), 503, "full"),
        (Unhealthy("the codec hangs"), 503, "unhealthy"),
        (OutOfMemory("no room"), 503, "unhealthy"),
        (DeadlinePassed("late"), 504, "deadline"),
        (EngineError("not finite"), 500, None),
        (ClientDisconnect(), 499, None),
        (RuntimeError("a bug"), 500, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_status_and_reason(error: Exception, status: int, reason: str | None) -> None:
    assert (status_of(error), reason_of(error)) == (status, reason)
