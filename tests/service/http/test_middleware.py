"""Request ids, metrics and audit lines, on the whole app and on the middleware alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dat_service.http.middleware import ObservabilityMiddleware
from dat_service.observability.metrics import Metrics
from dat_service.observability.records import RequestRecord
from tests.raw_requests import Reply, infer_images, send, tensor

IMAGE = np.zeros((2, 3, 8, 8), np.uint8)


@pytest.fixture(scope="module")
def open_url(serve_app: Callable[..., str]) -> str:
    return serve_app(codec="identity", max_body_bytes=4096, log_format="json", log_level="debug")


def samples(url: str) -> dict[str, float]:
    """Returns the samples by name and labels, without the labels codec and replica."""
    text = send(url, "GET", "/metrics").body.decode()
    rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {
        re.sub('(codec|replica)="[^"]*",?', "", name).replace(",}", "}").replace("{}", ""): float(value)
        for name, _, value in rows
    }


def ask(url: str, request_id: str | None, path: str = "/v2") -> Reply:
    return send(url, "GET", path, None, {"X-Request-Id": request_id} if request_id is not None else {})


def test_each_answer_has_an_id(open_url: str) -> None:
    for path in ("/v2", "/nowhere", "/metrics"):
        assert ask(open_url, "run-7/step-12", path).headers["x-request-id"] == "run-7/step-12"
        generated = [ask(open_url, None, path).headers["x-request-id"] for _ in range(3)]
        assert len(set(generated)) == 3
        assert all(re.fullmatch("[0-9a-f]{16}", m) for m in generated)
    for unusable in ("x" * 65, "two words", "na\xefve", ""):
        assert re.fullmatch("[0-9a-f]{16}", ask(open_url, unusable).headers["x-request-id"])
    assert infer_images(open_url, IMAGE, "UINT8").headers["x-request-id"]


def test_id_on_the_page_of_a_failure_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Starlette creates the response for status 500 outside of its own middleware."""
    from dat_service.http.app import create_app
    from dat_service.settings import Settings
    from dat_service.worker import CodecWorker

    worker = CodecWorker(Settings(codec="identity", log_format="json"))
    app = create_app(worker)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a bug")

    sent: list[Message] = []

    async def run() -> None:
        whole = {"path": "/broken", "method": "GET", "headers": [(b"x-request-id", b"mine")], "query_string": b""}
        with pytest.raises(RuntimeError, match="a bug"):  # for the server, which closes the connection
            await call(app, sent, **whole)

    asyncio.run(run())
    assert sent[0]["status"] == 500
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"mine"
    assert json.loads(sent[1]["body"]) == {"error": "internal error: RuntimeError"}
    line = json.loads(capsys.readouterr().err.splitlines()[0])
    assert line["request_id"] == "mine"
    assert "a bug" in line["exception"]


def test_requests_are_counted(open_url: str) -> None:
    before = samples(open_url)
    good = infer_images(open_url, IMAGE, "UINT8", parameters={"binary_data_output": True})
    assert good.status == 200
    entry, data = tensor("images", IMAGE, "UINT8")
    header = json.dumps({"inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header)), "X-Dat-Attempt": "3"}
    again = send(open_url, "POST", "/v2/models/identity/infer", header + data, headers)
    assert again.status == 200
    assert infer_images(open_url, IMAGE, "UINT8", codec="other").status == 404
    assert send(open_url, "POST", "/v2/models/identity/infer", bytes(5000)).status == 413
    assert send(open_url, "GET", "/v2/models/identity/infer").status == 405
    after = samples(open_url)
    grown = {name: after[name] - before.get(name, 0) for name in after if "bucket" not in name}
    assert grown['dat_requests_total{status="404"}'] == 1
    assert grown['dat_requests_total{status="413"}'] == 1
    assert grown['dat_requests_total{status="200"}'] == 3  # one scrape among them
    assert grown['dat_refusals_total{reason="too_large"}'] == 1
    assert grown['dat_refusals_total{reason="unknown"}'] == 1
    assert grown['dat_refusals_total{reason="method"}'] == 1
    assert grown["dat_retries_total"] == 1
    assert grown["dat_request_seconds_count"] == 2  # of codec work that went well
    assert 0 < grown["dat_request_seconds_sum"] < 60
    assert 2 * IMAGE.nbytes < grown['dat_bytes_total{direction="in"}'] < 2 * IMAGE.nbytes + 1000
    assert grown['dat_bytes_total{direction="out"}'] > len(good.body) + len(again.body)


def test_metrics_are_prometheus(open_url: str) -> None:
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
    from prometheus_client.parser import text_string_to_metric_families as families

    plain = send(open_url, "GET", "/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    om = send(open_url, "GET", "/metrics", None, accept)
    assert om.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = [family.name for family in families(plain.body.decode())]
    assert len(names) == len(set(names)) >= 15
    assert [f.name for f in open_families(om.body.decode())]
    info = next(f for f in families(plain.body.decode()) if f.name == "dat_codec_info").samples[0]
    assert info.labels.keys() == {"codec", "replica", "fingerprint", "engine", "device", "dtype"}
    assert "_created" not in plain.body.decode()


def test_status_says_what_runs_and_no_secret(
    serve_app: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys: Path = tmp_path_factory.mktemp("hidden-place") / "keys"
    keys.write_text("s3cr3t infer,admin\n")
    url = serve_app(codec="identity", api_key_file=keys)
    reply = send(url, "GET", "/v1/status", None, {"Authorization": "Bearer s3cr3t"})
    status = json.loads(reply.body)
    assert (status["codec"], status["replica"], status["ready"], status["api_keys"]) == (
        "identity",
        "local",
        True,
        1,
    )
    assert status["engine"]["device"] == "cpu"
    assert status["fingerprint"]
    assert status["gauges"]["held"] == 0
    assert status["settings"]["max_images"] == 1024
    assert b"s3cr3t" not in reply.body
    assert b"hidden-place" not in reply.body


# the middleware alone, around a small app


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def call(app: ASGIApp, sent: list[Message], **scope: Any) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    whole = {"type": "http", "method": "POST", "path": "/p", "headers": [], "client": ("10.0.0.9", 1)} | scope
    await app(whole, receive, send)


def test_buffers_and_receive_are_handed_on_as_they_are() -> None:
    view = memoryview(b"abc")
    received: list[Receive] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": view, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        sent: list[Message] = []
        await ObservabilityMiddleware(app, Metrics("c", "r"))(
            {"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send
        )
        assert received == [receive]
        assert sent[1]["body"] is view
        assert sent[0]["headers"][0][0] == b"x-request-id"

    asyncio.run(run())


def test_on_ray_serve_the_id_is_added_once() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    sent: list[Message] = []
    asyncio.run(call(ObservabilityMiddleware(app, Metrics("c", "r"), echo=False), sent))
    assert sent[0]["headers"] == []


@pytest.mark.parametrize("how", ["raises", "leaves"])
def test_answer_that_does_not_end_is_counted_as_such(how: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if how == "raises":
            raise ConnectionError

    metrics, records = Metrics("c", "r"), list[RequestRecord]()
    observe = ObservabilityMiddleware(app, metrics, trace=records.append)
    if how == "raises":
        with pytest.raises(ConnectionError):
            asyncio.run(call(observe, []))
    else:
        asyncio.run(call(observe, []))
    assert [s.status for s in records] == [499]
    assert metrics.registry.get_sample_value("dat_request_seconds_count", metrics.labels) == 0


def test_audit_lines_say_who_and_why_and_do_not_fill_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    from dat_service.observability import logs

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] |= {"refusal": "the key may infer", "reason": "scope", "key_id": "ci.nightly"}
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body"})

    logs.configure("json", "info")
    clock = Clock()
    observe = ObservabilityMiddleware(app, Metrics("c", "r"), clock=clock)
    headers = [(b"x-request-id", b"abc"), (b"authorization", b"Bearer s3cr3t"), (b"x-forwarded-for", b"1.2.3.4")]

    async def flood(times: int) -> None:
        for _ in range(times):
            await call(observe, [], path="/\n" + "p" * 500, headers=headers, query_string=b"token=s3cr3t")

    asyncio.run(flood(300))
    clock.now = 2
    asyncio.run(flood(1))
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert "s3cr3t" not in err
    assert len(lines) == 51
    assert lines[0]["request_id"] == "abc"
    assert lines[0]["fields"] == {
        "status": 403, "method": "POST", "path": "/\n" + "p" * 198, "reason": "scope", "peer": "10.0.0.9",
        "key": "ci.nightly", "forwarded_for": "1.2.3.4",
    }  # fmt: skip
    assert lines[50]["fields"]["not_logged_before"] == 250
