"""Spans arrive at a collector of the test's own, by OTLP over HTTP."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from dat_service.observability import tracing
from dat_service.observability.records import RequestRecord
from tests.conftest import app_in_thread
from tests.raw_requests import encoded, infer_images, send

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collects the spans that arrive, as OTLP's messages."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                named = {a.key: a.value.string_value for a in resource.resource.attributes}
                assert named["service.name"] == "dat-service"
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    yield spans
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_spans_of_requests(collected: list[Any]) -> None:
    with app_in_thread(codec="identity") as url:
        assert infer_images(url, np.zeros((1, 3, 8, 8), np.uint8), "UINT8").status == 200
        assert send(url, "POST", "/v1/reconstruct", encoded(np.zeros((3, 8, 8), np.uint8), "PNG")).status == 200
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        assert send(url, "GET", "/v2/models/other", None, headers).status == 404
    # the app has ended, and so all is sent
    inference = next(s for s in collected if s.name == "POST /v2/models/{codec}/infer")
    picture = next(s for s in collected if s.name == "POST /v1/reconstruct")
    for request in (inference, picture):
        stages = [s.name for s in collected if s.parent_span_id == request.span_id]
        assert stages == ["body", "queue", "codec"]
    refused = next(s for s in collected if s.name == "GET /v2/models/{codec}")
    assert refused.trace_id.hex() == TRACE
    assert refused.parent_span_id.hex() == PARENT
    attributes = {a.key: a.value.string_value or a.value.int_value for a in refused.attributes}
    assert attributes["http.response.status_code"] == 404
    assert attributes["dat.request_id"] == "mine"
    assert not inference.parent_span_id
    assert inference.end_time_unix_nano > inference.start_time_unix_nano


def test_stages_follow_one_another(collected: list[Any]) -> None:
    spans = tracing.Spans("identity", "local")
    spans.record(
        RequestRecord("POST", "/p", "/p", 503, "id", 10**18, 0.02, {"body": 0.005, "queue": 0.0015, "codec": 0.01})
    )
    spans.stop()
    by_name = {s.name: s for s in collected}
    request = by_name["POST /p"]
    spent = {n: (s.start_time_unix_nano - 10**18, s.end_time_unix_nano - 10**18) for n, s in by_name.items()}
    assert spent == {
        "POST /p": (0, 20_000_000),
        "body": (0, 5_000_000),
        "queue": (5_000_000, 6_500_000),
        "codec": (6_500_000, 16_500_000),
    }
    assert {by_name[n].parent_span_id for n in ("body", "queue", "codec")} == {request.span_id}
    assert request.status.code == 2  # error


def test_without_a_collector_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracing.start("identity", "local") is None


@pytest.mark.parametrize("missing", ["opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
    for name in [n for n in sys.modules if n.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        tracing.TracingUnavailable, match=r"_TRACES_ENDPOINT is set, but .*pip install 'dat-service\[otel\]'"
    ):
        tracing.wanted()
