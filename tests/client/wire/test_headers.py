from __future__ import annotations

import email.utils

import pytest

from dat_client.wire import headers


def test_retry_after_is_seconds_or_a_date():
    date = email.utils.formatdate(1000, usegmt=True)
    assert headers.retry_after_s(date, 990.0) == 10
    assert headers.retry_after_s(date, 2000.0) == 0
    assert [headers.retry_after_s(text, 0.0) for text in ("3", "-3")] == [3, 0]
    hostile = f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", f"Mon, 01 Jan 2030 00:00:00 +{'9' * 20}"
    assert [headers.retry_after_s(text, 0.0) for text in (None, "soon", "nan", *hostile)] == [None] * 5


@pytest.mark.parametrize("header", [None, "", "x", "a;dur=x", "a;dur=nan", ";;,,", "a;dur", "a;dur=1e999"])
def test_any_server_timing_is_read(header):
    assert headers.parse_server_timing(header) == {}


def test_a_written_server_timing_is_read_back():
    seconds = {"body": 0.001, "queue": 0.0, "codec": 1.5}
    assert headers.parse_server_timing(headers.format_server_timing(seconds)) == seconds
