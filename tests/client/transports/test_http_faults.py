"""Faults between client and server. The loopback server produces each on command, none depends on timing."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dat_client import (
    Client,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownCodec,
)
from dat_client.transports import retry

TRANSIENT = [
    "drop before reading",
    "drop after reading",
    "short",
    "reset",
    "refuse before reading",
    "status 408",
    "plain 408",
    "status 500",
    "status 502",
    "status 503",
    "status 504",
    "status 429",
    "status 503 0.01",
    "plain 502",
    "plain 404",
    "plain 405",
    "chunk of negative length",
]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_may_be_repeated_is_repeated(client, server, images, fault):
    server.faults.extend([fault] * 3)
    assert np.array_equal(client.discretize(images).reconstruction, images)
    assert not server.faults
    assert len(server.paths) == 4


def test_a_storm_of_all_faults_changes_no_answer(server):
    server.faults.extend(TRANSIENT * 3)
    with Client(server.url, retries=100, max_connections=4) as client:
        futures = [client.submit(np.full((1, 3, 8, 8 + n), n, np.uint8)) for n in range(20)]
        for n, future in enumerate(futures):
            reconstruction = future.result(30).reconstruction
            assert reconstruction.shape == (1, 3, 8, 8 + n)
            assert (reconstruction == n).all()
    assert not server.faults


@pytest.mark.parametrize("fault", ["short", "drop after reading", "status 500"])
def test_it_gives_up_with_the_number_of_attempts_and_the_cause(server, images, fault):
    server.every = fault
    with Client(server.url, retries=2, max_connections=1) as client:
        for calls in (1, 2):  # twice: a failed request must not keep the only connection's slot
            with pytest.raises(Unavailable, match=r"retries=2, 3 attempts .*last: ") as caught:
                client.discretize(images)
            assert caught.value.attempts == 3
            assert caught.value.cause in str(caught.value)
            assert caught.value.__cause__ is not None
            assert not isinstance(caught.value, Overloaded)
            assert len(server.paths) == 3 * calls
        server.every = ""
        assert np.array_equal(client.discretize(images).reconstruction, images)


def test_short_answers_are_named(server, images):
    server.every = "short"
    with Client(server.url, retries=0) as client, pytest.raises(Unavailable, match="IncompleteRead"):
        client.discretize(images)


def test_retry_after_is_honoured(server, images, monkeypatch):
    waits: list[float] = []
    server.faults.extend(["status 503 7", "status 429 9"])
    with Client(server.url) as client:
        monkeypatch.setattr(client._closed, "wait", lambda seconds: bool(waits.append(seconds)))
        client.discretize(images)
    assert 7 <= waits[0] < 7.1
    assert 9 <= waits[1] < 9.1


def test_full_for_too_long_is_overloaded(client, server, images):
    server.every = "status 503 1000"
    with pytest.raises(Overloaded, match="ordered") as caught:
        client.discretize(images)
    assert (caught.value.retry_after_s, caught.value.attempts) == (1000, 1)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("status 400", InvalidRequest),
        ("status 401", Unauthorized),
        ("status 403", Unauthorized),
        ("status 413", TooLarge),
        ("status 422", InvalidRequest),
        ("plain 307", ProtocolError),
        ("plain 413", TooLarge),
        ("plain 200", ProtocolError),
        ("garbage", ProtocolError),
    ],
)
def test_what_is_wrong_is_not_repeated(client, server, images, fault, kind):
    server.every = fault
    with pytest.raises(kind):
        client.discretize(images)
    assert len(server.paths) == 1


def test_404_of_another_server_that_stays_is_named(server, images):
    server.every = "plain 404"
    with Client(server.url, timeout_s=0.3) as client, pytest.raises(Unavailable) as caught:
        client.discretize(images)
    assert caught.value.attempts > 2
    for part in (
        f"last: {server.url}/v2/models/tiny-f8/infer: 404 from a server",
        "'<html>proxy</html>'",
        "check the URL",
    ):
        assert part in str(caught.value)


def test_unknown_codec_is_not_repeated(server, images):
    with Client(server.url, "nonsense") as client, pytest.raises(UnknownCodec):
        client.discretize(images)
    assert len(server.paths) == 1


def test_the_servers_field_value_and_limit_arrive(client, server, images):
    server.every = "status 422"
    with pytest.raises(InvalidRequest, match="ordered") as caught:
        client.discretize(images)
    assert (caught.value.field, caught.value.value, caught.value.limit, caught.value.status) == (
        "f",
        7,
        5,
        422,
    )


@pytest.mark.parametrize("fault", ["hang", "drip", "slow headers"])
def test_a_server_that_never_ends_costs_the_timeout_and_no_more(server, images, fault):
    with Client(server.url, max_connections=1) as client:
        for _ in range(2):
            server.every = fault
            with pytest.raises(Unavailable, match=r"timed out after timeout_s=0\.2\b"):
                client.discretize(images, timeout_s=0.2)
            server.every = ""
            assert np.array_equal(client.discretize(images).reconstruction, images)
    assert len(server.paths) <= 4


def test_a_server_that_reads_nothing_costs_the_timeout_not_the_connect_timeout():
    with socket.create_server(("127.0.0.1", 0), backlog=4) as listener:  # the kernel accepts, nobody reads
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        images = np.zeros((64, 3, 224, 224), np.uint8)
        with (
            Client(url, timeout_s=0.5, connect_timeout_s=0.05) as client,
            pytest.raises(Unavailable, match=r"timed out after timeout_s=0\.5\b, 1 attempt"),
        ):
            client.discretize(images)


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_nobody_there(images):
    with Client(free_url(), retries=3) as client:
        with pytest.raises(Unavailable, match=r"4 attempts.*refused"):
            client.discretize(images)
        assert client.live() is False
        assert client.ready() is False


def test_close_ends_the_waiting_for_a_repeat(server, images, monkeypatch):
    monkeypatch.setattr(retry, "pause_s", lambda *_: 1000.0)
    server.every = "status 500"
    client = Client(server.url, timeout_s=2000)
    future = client.submit(images)
    assert server.entered.acquire(timeout=10)
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        future.result(0)


def test_without_retries_a_lost_request_is_repeated_until_the_deadline(client, server, images):
    server.faults.extend(["drop after reading", "short", "status 502", "plain 500"] * 10)
    assert np.array_equal(client.discretize(images).reconstruction, images)
    assert len(server.paths) == 41


def test_a_bug_of_the_service_is_asked_for_nine_times(client, server, images):
    server.every = "status 500"
    with pytest.raises(Unavailable, match="after 9 times status 500, 9 attempts") as caught:
        client.discretize(images)
    assert caught.value.status == 500
    assert len(server.paths) == 9


def test_a_refusal_is_heard_before_the_body_is_sent():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:

        def refuse() -> int:  # answers, and neither reads the rest nor closes
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 14\r\n\r\n" + b"<html></html>\n")
                connection.settimeout(10)
                return sum(map(len, iter(lambda: connection.recv(1 << 20), b"")))

        read = thread.submit(refuse)
        images = np.zeros((400, 3, 224, 224), np.uint8)
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client, pytest.raises(Unauthorized):
            client.discretize(images)
        assert read.result(20) < images.nbytes


def test_idle_connections_that_the_server_closed_are_not_noticed(client, server, images):
    server.faults.extend(["", "drop before reading", "", "drop after reading"])
    for _ in range(3):
        assert np.array_equal(client.discretize(images).reconstruction, images)
    assert [headers["X-Dat-Attempt"] for headers in server.headers] == ["1", "1", "1"]
    assert len(server.paths) == 5


@pytest.mark.parametrize("fault", ["status 408", "plain 408"])
def test_a_body_that_is_too_slow_is_sent_four_times_and_not_for_ever(server, images, fault):
    server.every = fault
    says = "gave up after 4 times status 408: send fewer images at once, 4 attempts"
    with Client(server.url, timeout_s=1e6) as client:
        with pytest.raises(Unavailable, match=says) as caught:
            client.discretize(images)
        assert (caught.value.status, caught.value.attempts, len(server.paths)) == (408, 4, 4)
        server.every = ""
        assert np.array_equal(client.discretize(images).reconstruction, images)


def test_long_times_are_written_out(server, images):
    server.every = "status 503 100000"
    with Client(server.url, timeout_s=5000) as client, pytest.raises(Overloaded, match=r"in 10000\d s, would"):
        client.discretize(images)


def test_the_address_of_a_redirect_is_not_cut(client, server, images):
    address = "http://elsewhere/" + "x" * 200
    server.raw = lambda stream, *_: stream.write(
        f"HTTP/1.1 307 Moved\r\nLocation: {address}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    with pytest.raises(ProtocolError, match=f"redirects to {address};"):
        client.discretize(images)
