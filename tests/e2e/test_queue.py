"""The queue from outside: deadlines, fairness, disconnecting clients, and times in the responses."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from starlette.requests import Request

from dat_client import Client
from dat_service.http.exchange import caller_of
from dat_service.worker import CodecWorker
from tests.conftest import crop
from tests.raw_requests import Reply, infer_images, send, tensor, unread_request


@pytest.fixture(scope="module")
def tiny(serve_app: Callable[..., str]) -> str:
    url = serve_app(codec="tiny-f8", max_queue_s=3.0)
    # The speed is then known from large images. From a tiny one the service would expect a wait beyond its limit.
    assert infer(url, np.broadcast_to(crop("coffee", 224, 224), (4, 3, 224, 224))).status == 200
    return url


def request_of(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    entry, data = tensor("images", images, "UINT8")
    text = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    return text + data, {"Inference-Header-Content-Length": str(len(text))}


def infer(url: str, images: np.ndarray, codec: str = "tiny-f8", **headers: str) -> Reply:
    body, base = request_of(images)
    return send(
        url, "POST", f"/v2/models/{codec}/infer", body, base | {k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_answers_say_where_the_time_went(tiny: str) -> None:
    reply = infer_images(tiny, crop("coffee", 64, 64)[None], "UINT8", codec="tiny-f8")
    assert reply.status == 200
    times = {k: float(v) for k, v in re.findall(r"(\w+);dur=([\d.]+)", reply.headers["server-timing"])}
    assert times.keys() == {"body", "queue", "codec", "total"}
    assert times["codec"] > 0
    assert times["body"] + times["queue"] + times["codec"] <= times["total"] + 1


def test_a_deadline_is_honoured(tiny: str) -> None:
    images = np.broadcast_to(crop("coffee", 224, 224), (24, 3, 224, 224))
    reply = infer(tiny, images, x_dat_timeout_ms="50")
    assert reply.status == 504
    assert "deadline" in reply.error["error"]
    assert infer(tiny, images[:1], x_dat_timeout_ms="60000").status == 200


@pytest.mark.parametrize("timeout_ms", ["", "-1", "soon", "1e3", "9" * 12])
def test_a_deadline_that_is_none_is_refused(tiny: str, timeout_ms: str) -> None:
    reply = infer(tiny, np.zeros((1, 3, 8, 8), np.uint8), x_dat_timeout_ms=timeout_ms)
    assert reply.status == 422
    assert reply.error["field"] == "X-Dat-Timeout-Ms"


def test_a_flood_is_refused_and_others_are_not(tiny: str) -> None:
    """Six requests of 30 images at once are at least ten seconds of work, against a limit of three."""
    flood = np.broadcast_to(crop("coffee", 224, 224), (30, 3, 224, 224))
    assert infer(tiny, flood[:4]).status == 200  # the codec's speed is known
    replies: list[Reply] = []
    threads = [
        threading.Thread(target=lambda: replies.append(infer(tiny, flood, x_dat_client="flood"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    small = [infer(tiny, flood[:1], x_dat_client="small").status for _ in range(3)]
    for thread in threads:
        thread.join(120)
    assert small == [200] * 3
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 503}
    for reply in replies:
        if reply.status == 503:
            assert int(reply.headers["retry-after"]) >= 1
            assert "wait" in reply.error["error"]


def test_who_leaves_is_not_computed(monkeypatch: pytest.MonkeyPatch, serve_app: Callable[..., str]) -> None:
    workers: list[CodecWorker] = []
    load = CodecWorker.load

    def keep(self: CodecWorker) -> None:
        workers.append(self)
        load(self)

    monkeypatch.setattr(CodecWorker, "load", keep)
    url = serve_app(codec="tiny-f8")
    (worker,) = workers
    body, headers = request_of(np.broadcast_to(crop("coffee", 224, 224), (24, 3, 224, 224)))
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as s:
        lines = [f"{name}: {value}" for name, value in (headers | {"Content-Length": str(len(body))}).items()]
        s.sendall("\r\n".join(["POST /v2/models/tiny-f8/infer HTTP/1.1", "Host: x", *lines, "", ""]).encode())
        s.sendall(body)
        wait_until(lambda: worker.queued_images > 0)
    wait_until(lambda: worker.queued_images == 0 and worker.held == 0 and worker.held_bytes == 0)
    with Client(url, "tiny-f8") as client:
        assert client.discretize(crop("coffee", 64, 64)[None]).reconstruction is not None


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nothing_stays_held_after_refusals(monkeypatch: pytest.MonkeyPatch, serve_app: Callable[..., str]) -> None:
    workers: list[CodecWorker] = []
    load = CodecWorker.load
    monkeypatch.setattr(CodecWorker, "load", lambda self: (workers.append(self), load(self))[1])
    url = serve_app(codec="identity", max_images=2)
    for body, headers in [(b"{", {}), (b"\x80\x04K\x01.", {}), request_of(np.zeros((3, 3, 8, 8), np.uint8))]:
        assert send(url, "POST", "/v2/models/identity/infer", body, headers).status in (400, 413)
    wait_until(lambda: workers[0].held == 0 and workers[0].held_bytes == 0)


def test_places_are_not_had_by_made_up_names(serve_app: Callable[..., str], tmp_path: Path) -> None:
    """An address holds half of the slots at most, whatever X-Dat-Client it sends; so does a key."""
    keys = tmp_path / "keys"
    keys.write_text("secret-one infer one\nsecret-two infer two\n")
    for more, others in (({}, {"source": "127.0.0.2"}), ({"api_key_file": keys}, {"key": "secret-two"})):
        url = serve_app(codec="identity", max_requests=8, body_timeout_s=60, **more)
        auth = "Authorization: Bearer secret-one\r\n" if more else ""
        with ExitStack() as held:
            statuses = []
            for i in range(8):
                s = held.enter_context(unread_request(url, headers=f"X-Dat-Client: name-{i}\r\n{auth}"))
                statuses.append(s.recv(12))
            assert statuses == [b"HTTP/1.1 200"] * 4 + [b"HTTP/1.1 503"] * 4
            assert status_from(url, **others) == 200


def status_from(url: str, source: str = "127.0.0.1", key: str = "") -> int:
    """Returns the status of one small request from an address, with a key."""
    parts = urlsplit(url)
    body, headers = request_of(np.zeros((1, 3, 8, 8), np.uint8))
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, source_address=(source, 0), timeout=60
    )
    try:
        connection.request("POST", "/v2/models/identity/infer", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(("behind_proxy", "holder"), [(False, "peer/10.0.0.1"), (True, "peer/10.0.0.7")])
def test_the_address_is_haproxys_word_on_ray_alone(behind_proxy: bool, holder: str) -> None:
    """Without HAProxy in front of the app, clients can write anything into X-Forwarded-For."""
    request = Request(
        {
            "type": "http",
            "client": ("10.0.0.1", 1),
            "headers": [(b"x-forwarded-for", b"10.0.0.7"), (b"x-dat-client", b"me")],
            "app": SimpleNamespace(state=SimpleNamespace(behind_proxy=behind_proxy)),
        }
    )
    caller = caller_of(request, 0.0)
    assert (caller.holder, caller.flow) == (holder, "/me")
