from __future__ import annotations

import pytest

from dat_client.errors import (
    InvalidRequest,
    Overloaded,
    ProtocolError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownCodec,
)
from dat_client.transports.connections import Reply
from dat_client.transports.http import error_of
from dat_client.wire import encode_error


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (400, {}, InvalidRequest),
        (401, {}, Unauthorized),
        (403, {}, Unauthorized),
        (404, {}, UnknownCodec),
        (408, {}, Unavailable),
        (413, {}, TooLarge),
        (422, {}, InvalidRequest),
        (429, {}, Overloaded),
        (500, {}, Unavailable),
        (502, {}, Unavailable),
        (503, {}, Unavailable),
        (503, {"retry-after": "2"}, Overloaded),
        (504, {}, Unavailable),
        (301, {"location": "http://other/"}, ProtocolError),
    ],
)
def test_statuses_become_exceptions(status, headers, kind):
    body = bytearray(encode_error("too hot", "images", 7, 5))
    error = error_of(Reply(status, headers, body), "http://x/infer")
    assert type(error) is kind
    assert "http://x/infer" in str(error)
    assert kind is ProtocolError or "too hot" in str(error)
    if isinstance(error, InvalidRequest):
        assert (error.field, error.value, error.limit, error.status) == ("images", 7, 5, status)
    if isinstance(error, Overloaded):
        assert error.retry_after_s == (2.0 if headers else None)


def test_answers_that_are_not_the_protocols():
    assert error_of(Reply(200, {}, bytearray()), "u") is None
    for status in (100, 101, 201, 204, 206, 299, 600, 999):
        assert type(error_of(Reply(status, {}, bytearray()), "u")) is ProtocolError
    page = bytearray(b"<html>" * 1000)
    too_large = error_of(Reply(413, {}, page), "u")
    assert type(too_large) is TooLarge
    assert len(str(too_large)) < 200


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"Path '/v2/models/tiny-f8/infer' not found. Ping http://.../-/routes for available routes."),
        (404, b"<html><h1>404 Not Found</h1></html>"),
        (404, b'{"detail":"Not Found"}'),
        (404, b'{"timestamp":"2024-01-01","status":404,"error":"Not Found","path":"/v2"}'),
        (404, b""),
        (405, b"<html>405 Not Allowed</html>"),
        (410, b"gone"),
        (421, b"misdirected"),
        (501, b"Unsupported method"),
        (502, b"<html>502 Bad Gateway</html>"),
        (503, b"upstream connect error"),
        (504, b"stream timeout"),
    ],
)
def test_what_another_server_says_is_like_a_lost_connection(status, body):
    url = "http://codec:8000/v2/models/x/infer"
    error = error_of(Reply(status, {"server": "nginx/1.25"}, bytearray(body)), url)
    assert type(error) is Unavailable
    assert error.status is None
    assert error.cause == str(error)
    assert str(error).startswith(f"{url}: {status} from a server that calls itself 'nginx/1.25'")
    assert (repr(body.decode()[:30])[:-1] if body else "is empty") in str(error)
    assert str(error).endswith("; if the service is running, check the URL")


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InvalidRequest), (401, Unauthorized), (403, Unauthorized), (413, TooLarge)]
)
def test_what_a_proxy_refuses_is_not_repeated(status, kind):
    error = error_of(Reply(status, {}, bytearray(b"<html>no</html>")), "u")
    assert type(error) is kind
    assert error.status == status
    assert "a server without a name" in str(error)


def test_full_proxies_are_waited_for():
    error = error_of(Reply(503, {"retry-after": "7"}, bytearray(b"maintenance")), "u")
    assert type(error) is Overloaded
    assert (error.retry_after_s, error.status) == (7.0, None)
