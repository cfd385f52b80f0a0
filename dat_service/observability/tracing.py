"""Sends an OpenTelemetry span of each request to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names.

If the variable is not set, no spans are created. A span is created from recorded timestamps after the response has
been sent, so tracing costs nothing while a request runs.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module

from dat_client.wire.headers import TIMED_STAGES
from dat_service import __version__
from dat_service.observability.records import RequestRecord

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class TracingUnavailable(ValueError):
    """A collector is configured, but the packages that would send spans to it are not installed."""


def wanted() -> bool:
    """Returns True if a collector is configured. Raises TracingUnavailable if OpenTelemetry is then missing."""
    configured = [name for name in ENDPOINTS if os.environ.get(name)]
    if not configured:
        return False
    try:
        import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")  # this module also imports the SDK
    except ImportError:
        raise TracingUnavailable(
            f"{configured[0]} is set, but OpenTelemetry is not installed: pip install 'dat-service[otel]'"
        ) from None
    return True


class Spans:
    """Sends spans to the collector from one of OpenTelemetry's threads, as configured by the OTEL_* variables.

    >>> spans = Spans("tiny-f8", "local")     # doctest: +SKIP
    >>> spans.record(request_record)          # doctest: +SKIP
    >>> spans.stop()                          # doctest: +SKIP
    """

    def __init__(self, codec: str, replica: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        attributes = {"service.version": __version__, "service.instance.id": replica, "dat.codec": codec}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            attributes["service.name"] = "dat-service"
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("dat_service", __version__)

    def record(self, request: RequestRecord) -> None:
        """Creates the span of a request, with one child span for each timed stage.

        If the client sent a `traceparent` header, the span of the request is a child of the client's span.
        """
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers.items()}
        span = self._tracer.start_span(
            f"{request.method} {request.route}".strip(),
            context=TraceContextTextMapPropagator().extract(headers),
            kind=trace.SpanKind.SERVER,
            start_time=request.began_ns,
            attributes={
                "http.request.method": request.method,
                "http.route": request.route,
                "http.response.status_code": request.status,
                "dat.request_id": request.request_id,
            },
        )
        if request.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        at = request.began_ns
        for name in TIMED_STAGES:
            if name in request.stage_seconds:
                child = self._tracer.start_span(name, context=trace.set_span_in_context(span), start_time=at)
                at += round(request.stage_seconds[name] * 1e9)
                child.end(at)
        span.end(request.began_ns + round(request.seconds * 1e9))

    def stop(self) -> None:
        """Sends the remaining spans, for at most 5 s: the service must also stop if the collector is down."""
        shutdown = threading.Thread(target=self._provider.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(5)


def start(codec: str, replica: str) -> Spans | None:
    """Returns a sender of spans, or None if no collector is configured. Raises TracingUnavailable like `wanted`."""
    return Spans(codec, replica) if wanted() else None
