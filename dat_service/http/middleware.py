"""Observes every request from outside the app: gives it an id, counts it, logs it and records its span."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dat_client.errors import sentence
from dat_client.wire import headers
from dat_service.observability.logs import REQUEST_ID
from dat_service.observability.metrics import Metrics
from dat_service.observability.records import INCOMPLETE, RequestRecord

log = logging.getLogger("dat_service")
audit_log = logging.getLogger("dat_service.audit")

LONGEST_ID = 64
ID_HEADER, ATTEMPT_HEADER = (name.lower().encode() for name in (headers.REQUEST_ID, headers.ATTEMPT))
FORWARDED_FOR = b"x-forwarded-for"
RECORDED_HEADERS = frozenset((ID_HEADER, ATTEMPT_HEADER, FORWARDED_FOR, b"traceparent", b"tracestate"))


class ObservabilityMiddleware:
    """ASGI middleware around the whole app, including its error responses.

    `receive` and the buffers of a response are passed on unchanged: this class neither reads, joins nor stores
    them. If `echo` is True, it adds X-Request-Id to responses; on Ray Serve, Serve's own middleware adds that
    header. The app reports facts about a request in `scope["state"]`, under the keys `key_id`, `body_bytes` and
    `stage_seconds`, and for a refused request also `refusal` (the message) and `reason`.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        echo: bool = True,
        trace: Callable[[RequestRecord], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.metrics, self.echo, self.trace = app, metrics, echo, trace
        self.audit = AuditLog(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, began_ns = time.perf_counter(), time.time_ns()
        recorded = {name: value for name, value in scope["headers"] if name in RECORDED_HEADERS}
        request_id = usable_id(recorded.get(ID_HEADER)) or secrets.token_hex(8)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        status, bytes_out, complete = INCOMPLETE, 0, False

        async def observed_send(message: Message) -> None:
            nonlocal status, bytes_out, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.echo:
                    message = {
                        **message,
                        "headers": [*message.get("headers", ()), (ID_HEADER, request_id.encode())],
                    }
                await send(message)
            else:
                await send(message)
                bytes_out += len(message.get("body", b""))
                complete = not message.get("more_body", False)

        try:
            await self.app(scope, receive, observed_send)
        finally:
            record = RequestRecord(
                method=scope["method"],
                path=scope["path"],
                route=getattr(scope.get("route"), "path", ""),
                status=status if complete else INCOMPLETE,
                request_id=request_id,
                began_ns=began_ns,
                seconds=time.perf_counter() - began,
                stage_seconds=state.get("stage_seconds", {}),
                headers=recorded,
            )
            self._ended(record, bytes_out, scope)
            REQUEST_ID.reset(token)

    def _ended(self, record: RequestRecord, bytes_out: int, scope: Scope) -> None:
        state = scope["state"]
        succeeded = record.status < 400 and record.method == "POST"
        self.metrics.request(
            record.status, state.get("body_bytes", 0), bytes_out, record.seconds if succeeded else None
        )
        attempt = record.headers.get(ATTEMPT_HEADER, b"1")
        if attempt.isdigit() and int(attempt[:9]) > 1:
            self.metrics.retried()
        reason = state.get("reason")
        if reason is not None and record.status != INCOMPLETE:
            self.metrics.refused(reason)
            self.audit.write(record, reason, state["refusal"], state.get("key_id", ""), scope.get("client"))
        elif log.isEnabledFor(logging.DEBUG):
            seconds = round(record.seconds, 6)
            log.debug(
                "answered", extra={"fields": common_fields(record) | {"seconds": seconds, "bytes": bytes_out}}
            )
        if self.trace is not None:
            self.trace(record)


class AuditLog:
    """Logs a line for each refused request, at most 50 lines per second, so that a flood cannot fill the disk."""

    PER_SECOND = 50

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.second, self.written, self.dropped = 0, 0, 0

    def write(
        self, record: RequestRecord, reason: str, message: str, key_id: str, client: tuple[str, int] | None
    ) -> None:
        """Logs the line for a refused request, or counts the line as dropped if 50 were logged this second.

        The next line that is logged reports the number of dropped lines.
        """
        second = int(self.clock())
        if second != self.second:
            self.second, self.written = second, 0
        if self.written >= self.PER_SECOND:
            self.dropped += 1
            return
        self.written += 1
        fields = common_fields(record) | {"reason": reason, "peer": client[0] if client else "", "key": key_id}
        if forwarded_for := record.headers.get(FORWARDED_FOR):
            # on Ray, HAProxy has written this header; with --local, a client may have
            fields["forwarded_for"] = forwarded_for[:100].decode("latin-1")
        if self.dropped:
            fields["not_logged_before"], self.dropped = self.dropped, 0
        audit_log.warning("refused: %s", sentence(message), extra={"fields": fields})


def common_fields(record: RequestRecord) -> dict[str, Any]:
    """Returns the fields that all log lines about requests have; not the query, which may contain secrets."""
    return {"status": record.status, "method": record.method[:16], "path": record.path[:200]}


def usable_id(value: bytes | None) -> str | None:
    """Returns the request id that a client sent, or None unless it is 1 to 64 visible ASCII characters."""
    if value and len(value) <= LONGEST_ID and all(33 <= byte <= 126 for byte in value):
        return value.decode("ascii")
    return None
