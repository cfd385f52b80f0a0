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
    assert type(error_of(Reply(404, {}, page), "u")) is ProtocolError
    too_large = error_of(Reply(413, {}, page), "u")
    assert type(too_large) is TooLarge
    assert len(str(too_large)) < 200
