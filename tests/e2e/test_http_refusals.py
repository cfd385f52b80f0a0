"""Requests that HTTP or the address forbids get their status and a message; the next request works."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.refusals import GOOD, LIMITS, identity, next_request_works, refused
from tests.raw_requests import (
    encoded,
    infer_images,
    send,
    unread_request,
)

__all__ = ["identity", "next_request_works"]


def test_connection_that_ends_within_the_body(identity: str) -> None:
    parts = urlsplit(identity)
    with socket.create_connection((parts.hostname, parts.port)) as s:
        s.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n0123456789")


def test_body_that_stops_coming(serve_app: Callable[..., str]) -> None:
    parts = urlsplit(serve_app(**LIMITS, body_timeout_s=0.2))
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as s:
        s.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n0123456789")
        assert s.recv(1000).startswith(b"HTTP/1.1 408")


def test_body_without_length_that_goes_on_and_on(identity: str) -> None:
    reply = send(identity, "POST", "/v2/models/identity/infer", iter([bytes(1 << 20)] * 9), {})
    refused(reply, 413, "body", "", str(LIMITS["max_body_bytes"]))


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ("", "Host"),
        ("Host: a\r\nHost: b\r\n", "Host"),
        ("Host: a\r\nAuthorization: Bearer a\r\nauthorization: Bearer b\r\n", "Authorization"),
        ("Host: a\r\nInference-Header-Content-Length: 1\r\nInference-Header-Content-Length: 2\r\n", "Inference"),
    ],
)
def test_headers_that_are_missing_or_repeated(identity: str, headers: str, field: str) -> None:
    parts = urlsplit(identity)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as s:
        s.sendall(f"GET /v2 HTTP/1.1\r\n{headers}\r\n".encode())
        answer = s.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    error = json.loads(body)
    assert error["field"].startswith(field)
    assert error["limit"] == "must be given once"
    assert b"Bearer" not in body


def test_old_http_needs_no_host(identity: str) -> None:
    parts = urlsplit(identity)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as s:
        s.sendall(b"GET /v2 HTTP/1.0\r\n\r\n")
        assert s.makefile("rb").read().startswith(b"HTTP/1.1 200")


def test_compressed_body(identity: str) -> None:
    reply = send(identity, "POST", "/v2/models/identity/infer", b"x", {"Content-Encoding": "gzip"})
    refused(reply, 400, "Content-Encoding", "gzip", "absent")


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate,chunked"])
def test_body_whose_transfer_is_compressed(identity: str, coding: str) -> None:
    reply = send(
        identity, "POST", "/v2/models/identity/infer", b"1\r\nx\r\n0\r\n\r\n", {"Transfer-Encoding": coding}
    )
    refused(reply, 400, "Transfer-Encoding", coding, "must be chunked or absent")


def test_upgrade_is_refused_and_the_connection_closed(identity: str) -> None:
    """The parser would take the body for another request."""
    parts = urlsplit(identity)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as s:
        s.sendall(
            b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
            b"Content-Length: 42\r\n\r\n"
        )
        time.sleep(0.1)
        s.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = b""
        try:
            while more := s.recv(4000):
                answers += more
        except ConnectionResetError:
            pass
    assert answers.startswith(b"HTTP/1.1 400")
    assert answers.count(b"HTTP/1.1") == 1


def test_reader_that_does_not_read_gives_its_place_back(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity", max_requests=1, body_timeout_s=0.3)
    with unread_request(url):
        statuses = set()
        deadline = time.monotonic() + 60
        while 200 not in statuses or 503 not in statuses:
            statuses.add(infer_images(url, GOOD, "UINT8").status)
            assert time.monotonic() < deadline, statuses
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/identity/versions/7", 404),
        ("GET", "/nothing", 404),
        ("GET", "/redoc", 404),
        ("GET", "/v2/models/identity/infer", 405),
        ("DELETE", "/v2", 405),
    ],
)
def test_address_that_is_not_served(identity: str, method: str, path: str, status: int) -> None:
    reply = send(identity, method, path)
    assert reply.status == status
    assert reply.error["error"]


def test_unknown_codec_is_named_with_the_known_one(identity: str) -> None:
    refused(send(identity, "GET", "/v2/models/other"), 404, "codec", "other", "identity")


def test_api_keys(serve_app: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# the team's\nfirst-key\nsecond-key\n")
    url = serve_app(codec="identity", api_key_file=keys)
    for path in ("/v2/models/identity", "/v2/models/other", "/v2/models/identity/ready"):
        assert send(url, "GET", path).status == 401
    for given in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic first-key"},
    ):
        reply = send(url, "POST", "/v1/reconstruct", encoded(GOOD[0], "PNG"), given)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization" in reply.error["error"]
        assert "first-key" not in reply.body.decode()
    for key in ("first-key", "second-key"):
        assert send(url, "GET", "/v2/models/identity", None, {"Authorization": f"Bearer {key}"}).status == 200
    assert send(url, "GET", "/v2/health/ready").status == 200


def test_full_service_asks_to_come_again(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity", max_requests=1, body_timeout_s=60)
    with unread_request(url):
        deadline = time.monotonic() + 10
        while (reply := infer_images(url, GOOD, "UINT8")).status != 503:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert int(reply.headers["retry-after"]) >= 1
        refused_by = reply.error["error"]
        assert "1 requests" in refused_by
    deadline = time.monotonic() + 10
    while infer_images(url, GOOD, "UINT8").status != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
