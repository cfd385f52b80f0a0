"""OpenTelemetry spans of requests, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector; without it, nothing.

They are made from timestamps once the answer is out: while a request runs, tracing costs nothing.
"""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dat_service import __version__

if TYPE_CHECKING:
    from dat_service.http.middleware import Seen

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
STAGES = ("body", "queue", "codec")  # of Server-Timing, in the order in which they happen


class TracingUnavailable(ValueError):
    """A collector is named, and what speaks to it is not installed."""


def wanted() -> bool:
    """Whether a collector is named. Raises TracingUnavailable where it could not be spoken to."""
    named = [name for name in ENDPOINTS if os.environ.get(name)]
    if not named:
        return False
    try:
        missing = any(find_spec(name) is None for name in ("opentelemetry.sdk.trace", EXPORTER))
    except ModuleNotFoundError:  # of a package above one of them
        missing = True
    if missing:
        raise TracingUnavailable(
            f"{named[0]} is set, and OpenTelemetry is missing: pip install 'dat-service[otel]'"
        )
    return True


class Spans:
    """Sends spans to the collector, from a thread of OpenTelemetry's own; OTEL_* variables say how and where.

    >>> spans = Spans("tiny-f8", "local")     # doctest: +SKIP
    >>> spans.record(seen)                    # doctest: +SKIP
    >>> spans.stop()                          # doctest: +SKIP
    """

    def __init__(self, codec: str, replica: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        facts = {"service.version": __version__, "service.instance.id": replica, "dat.codec": codec}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            facts["service.name"] = "dat-service"
        self._provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("dat_service", __version__)

    def record(self, seen: Seen) -> None:
        """The spans of one request: itself, as a child of the caller's, and its stages."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in seen.headers.items()}
        span = self._tracer.start_span(
            f"{seen.method} {seen.route}".strip(),
            context=TraceContextTextMapPropagator().extract(given),
            kind=trace.SpanKind.SERVER,
            start_time=seen.began_ns,
            attributes={
                "http.request.method": seen.method,
                "http.route": seen.route,
                "http.response.status_code": seen.status,
                "dat.request_id": seen.request_id,
            },
        )
        if seen.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        at = seen.began_ns
        stages = parse_timing(seen.timing)
        for name in STAGES:
            if name in stages:
                child = self._tracer.start_span(name, context=trace.set_span_in_context(span), start_time=at)
                at += round(stages[name] * 1e6)
                child.end(at)
        span.end(seen.began_ns + round(seen.seconds * 1e9))

    def stop(self) -> None:
        """Sends what is left, if the collector takes it within 5 s: a service must be able to end without one."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(5)


def parse_timing(header: str) -> dict[str, float]:
    """Milliseconds by name, of a Server-Timing header of our own: `body;dur=1.5, queue;dur=0.2`."""
    entries = (entry.strip().partition(";dur=") for entry in header.split(",") if ";dur=" in entry)
    return {name: float(value) for name, _, value in entries}


def start(codec: str, replica: str) -> Spans | None:
    """Spans where a collector is named, else None."""
    return Spans(codec, replica) if wanted() else None
