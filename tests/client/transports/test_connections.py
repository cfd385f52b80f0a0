"""The client's own connections: what they carry, and that none is left open."""

from __future__ import annotations

import gc
import re
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from dat_client import Client, ProtocolError
from tests.client.loopback import running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and, in the same file, its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both


def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    large = np.random.default_rng(0).integers(0, 256, (16, 3, 224, 224), np.uint8)
    with running(context) as server:
        with Client(server.url) as stranger, pytest.raises(ProtocolError, match=r"TLS failed.*certificate"):
            stranger.discretize(large)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with Client(server.url) as client:
            before = server.connections
            for _ in range(3):
                assert np.array_equal(client.discretize(large).reconstruction, large)
            assert server.connections == before + 1
            server.faults.extend(["reset", "drop before reading", "short"])
            assert np.array_equal(client.discretize(large).reconstruction, large)


def test_http_on_a_tls_address(server) -> None:
    url = server.url.replace("http", "https")
    with Client(url, timeout_s=5) as client, pytest.raises(ProtocolError, match="TLS failed"):
        client.metadata()


def test_every_request_names_itself_its_client_its_attempt_and_its_time(client, server, images) -> None:
    server.faults.extend(["status 503 0", "short"])
    client.discretize(images, timeout_s=15)
    client.decode(np.zeros((1, 2, 2), int))
    first, second, third = server.headers[-3:]
    assert first["X-Request-Id"] == second["X-Request-Id"] == server.requests[0].id
    assert third["X-Request-Id"] == server.requests[-1].id != server.requests[0].id
    assert [headers["X-Dat-Attempt"] for headers in (first, second, third)] == ["2", "3", "1"]
    assert 0 < int(second["X-Dat-Timeout-Ms"]) <= int(first["X-Dat-Timeout-Ms"]) <= 15_000
    assert 15_000 < int(third["X-Dat-Timeout-Ms"]) <= 20_000
    assert len({headers["X-Dat-Client"] for headers in server.headers}) == 1
    assert all(re.fullmatch(r"[\x21-\x7e]{1,64}", headers["X-Dat-Client"]) for headers in server.headers)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://[::1]", ("::1", 80)),
        ("https://[::1]/x", ("::1", 443)),
        ("http://[2001:db8::8000]:81", ("2001:db8::8000", 81)),
        ("http://bücher.example", ("bücher.example", 80)),
    ],
)
def test_the_address_is_that_of_the_url(url, address, monkeypatch) -> None:
    addresses: list[tuple[str, int]] = []

    def nobody(address: tuple[str, int], *_: object) -> socket.socket:
        addresses.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", nobody)
    with Client(url) as client:
        assert not client.live()
    assert addresses == [address]


def test_two_clients_have_two_names(server, images) -> None:
    for _ in range(2):
        with Client(server.url) as client:
            client.discretize(images)
    assert server.headers[0]["X-Dat-Client"] != server.headers[1]["X-Dat-Client"]


def test_tensors_are_sent_from_where_they_lie_and_received_where_they_stay(client, server, monkeypatch) -> None:
    """No block of 1 MB or more is allocated between the array and the socket."""
    images = np.random.default_rng(2).integers(0, 256, (32, 3, 224, 224), np.uint8)
    sent: list[object] = []
    send = socket.socket.send
    monkeypatch.setattr(
        socket.socket, "send", lambda sock, data, *flags: (sent.append(data), send(sock, data, *flags))[1]
    )
    q = client.discretize(images)
    large = [data for data in sent if isinstance(data, memoryview) and len(data) > images.nbytes // 2]
    assert all(np.shares_memory(np.frombuffer(data, np.uint8), images) for data in large)
    assert large
    whole = q.reconstruction
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    owner = whole if whole.base is None else np.asarray(whole.base)
    assert owner.nbytes < images.nbytes + 1000  # the reply's one array: its JSON and the pictures
    assert q.reconstruction.flags.writeable


def test_a_client_that_is_dropped_leaves_nothing_open(server, images) -> None:
    client = Client(server.url, max_in_flight=2)  # a ResourceWarning would fail this test
    client.discretize(images)
    client.submit(images).result(20)
    sockets = [connection.sock for connection in client._transport._connections._idle]
    assert sockets
    del client
    gc.collect()
    assert all(sock.fileno() == -1 for sock in sockets)


def test_no_descriptor_is_lost_in_hundreds_of_faults(server, images) -> None:
    server.faults.extend(["short", "reset", "drop after reading", "refuse before reading", "status 503 0"] * 60)
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with Client(server.url, timeout_s=120, max_connections=4) as client:
        while server.faults:
            client.discretize(images)
    for thread in threading.enumerate():  # those of the server, which hold its ends
        if "process_request_thread" in thread.name:
            thread.join(20)
    if descriptors:
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2


def test_an_interrupt_in_the_middle_of_a_call_leaves_the_client_whole(server, images, monkeypatch) -> None:
    with Client(server.url, max_connections=1) as client:
        client.discretize(images)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("dat_client.transports.connections._read_body", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.discretize(images)
        assert np.array_equal(client.discretize(images, timeout_s=5).reconstruction, images)
    assert server.connections == 2
