"""Sees every request from outside: gives it its id, counts it, logs it, and has its spans made."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dat_service.observability.logs import REQUEST_ID
from dat_service.observability.metrics import Metrics

log = logging.getLogger("dat_service")
audit_log = logging.getLogger("dat_service.audit")

LONGEST_ID = 64
GONE = 499  # nginx's number for an answer that was not sent whole; nobody reads it but the metrics
REASONS = {
    400: "malformed", 401: "key", 403: "scope", 404: "unknown", 405: "method", 408: "slow", 413: "too_large",
    422: "invalid", 429: "full", 503: "full", 504: "deadline",
}  # fmt: skip
WANTED = frozenset((b"x-request-id", b"x-dat-attempt", b"x-forwarded-for", b"traceparent", b"tracestate"))


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a request that has ended."""

    method: str
    path: str
    route: str
    status: int
    request_id: str
    began_ns: int  # since the epoch
    seconds: float
    timing: str  # the answer's Server-Timing
    headers: dict[bytes, bytes]  # those in WANTED


class Observe:
    """ASGI middleware around the whole app, error pages included.

    `receive` is handed on as it came, and so are the buffers of an answer: nothing is read, joined or kept.
    `echo`: whether answers get X-Request-Id here; Ray Serve has a middleware of its own that adds it. What the
    app leaves in `scope["state"]`: `key_id`, `body_bytes`, and `refusal`, the message of a refused request, with
    `reason` where the status alone does not say it.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        echo: bool = True,
        trace: Callable[[Seen], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.metrics, self.echo, self.trace = app, metrics, echo, trace
        self.audit = Audit(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, began_ns = time.perf_counter(), time.time_ns()
        headers = {name: value for name, value in scope["headers"] if name in WANTED}
        request_id = usable_id(headers.get(b"x-request-id")) or secrets.token_hex(8)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        status, sent, whole, timing = GONE, 0, False, ""

        async def watched(message: Message) -> None:
            nonlocal status, sent, whole, timing
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message.get("headers", ())
                timing = next((v.decode("latin-1") for k, v in given if k == b"server-timing"), "")
                if self.echo:
                    message = {**message, "headers": [*given, (b"x-request-id", request_id.encode())]}
                await send(message)
            else:
                await send(message)
                sent += len(message.get("body", b""))
                whole = not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched)
        finally:
            seen = Seen(
                method=scope["method"],
                path=scope["path"],
                route=getattr(scope.get("route"), "path", ""),
                status=status if whole else GONE,
                request_id=request_id,
                began_ns=began_ns,
                seconds=time.perf_counter() - began,
                timing=timing,
                headers=headers,
            )
            self._ended(seen, sent, scope)
            REQUEST_ID.reset(token)

    def _ended(self, seen: Seen, sent: int, scope: Scope) -> None:
        state = scope["state"]
        good = seen.status < 400
        self.metrics.request(
            seen.status,
            state.get("body_bytes", 0),
            sent,
            seen.seconds if good and seen.method == "POST" else None,
        )
        attempt = seen.headers.get(b"x-dat-attempt", b"1")
        if attempt.isdigit() and int(attempt[:9]) > 1:
            self.metrics.retried()
        refusal = state.get("refusal")
        if refusal is not None and seen.status in REASONS:
            reason = state.get("reason") or REASONS[seen.status]
            self.metrics.refused(reason)
            self.audit.line(seen, reason, refusal, state.get("key_id", ""), scope.get("client"))
        elif log.isEnabledFor(logging.DEBUG):
            log.debug(
                "answered", extra={"fields": about(seen) | {"seconds": round(seen.seconds, 6), "bytes": sent}}
            )
        if self.trace is not None:
            self.trace(seen)


class Audit:
    """A line for each refused request, at most 50 in a second: a flood must not fill the disk."""

    PER_SECOND = 50

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.second, self.written, self.dropped = 0, 0, 0

    def line(self, seen: Seen, reason: str, message: str, key_id: str, client: tuple[str, int] | None) -> None:
        """Writes it, or counts it for the first line of a later second to say."""
        second = int(self.clock())
        if second != self.second:
            self.second, self.written = second, 0
        if self.written >= self.PER_SECOND:
            self.dropped += 1
            return
        self.written += 1
        said = about(seen) | {"reason": reason, "peer": client[0] if client else "", "key": key_id}
        if forwarded := seen.headers.get(b"x-forwarded-for"):
            said["forwarded_for"] = forwarded[:100].decode("latin-1")  # a proxy's word, or anybody's
        if self.dropped:
            said["not_logged_before"], self.dropped = self.dropped, 0
        audit_log.warning("refused: %s", message[:400], extra={"fields": said})


def about(seen: Seen) -> dict[str, Any]:
    """What every line says of a request. No query: it may hold what its sender took for private."""
    return {"status": seen.status, "method": seen.method[:16], "path": seen.path[:200]}


def usable_id(given: bytes | None) -> str | None:
    """A client's own request id, where it is at most 64 visible ASCII characters."""
    if given and len(given) <= LONGEST_ID and all(33 <= byte <= 126 for byte in given):
        return given.decode("ascii")
    return None
