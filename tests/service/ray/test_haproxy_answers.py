"""What dat-haproxy answers itself: errors in OIP's form, and 503 as long as it knows no replica for a path."""

from __future__ import annotations

import http.client
import json
import socket
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest

from dat_service.ray import haproxy_wrapper
from dat_service.ray.haproxy_wrapper import MARK, prepare
from tests.conftest import free_port
from tests.service.ray.test_haproxy_wrapper import StandInReplica, any_replica, get, ray_config, running, until

READY = "/v2/models/toy/ready"
INFER = "/v2/models/toy/infer"


@pytest.mark.parametrize("path", [READY, INFER, "/v2/health/ready", "/v2", "/", "/v1/status"])
def test_before_it_knows_a_replica_the_status_is_503(tmp_path: Path, path: str) -> None:
    """Each HAProxy begins with this configuration, and that of a stopping service ends with it."""
    port = free_port()
    with (
        StandInReplica() as proxy,
        running(ray_config(tmp_path, port, None, fallback=proxy.server_port), port, "--own", f"127.0.0.1:{port},/"),
    ):
        status, headers, answer = get(port, path)
    assert (status, headers["Retry-After"], headers["Content-Type"]) == (503, "1", "application/json")
    assert "starting" in answer["error"]
    assert proxy.checks == 0


def test_codec_that_is_not_there_yet_beside_one_that_is(tmp_path: Path) -> None:
    """/toy has a replica, /other starts, and nothing else belongs to the service."""
    port = free_port()
    own = f"127.0.0.1:{port},/toy,/other"
    with StandInReplica() as replica:
        threading.Thread(target=replica.serve_forever, args=[0.05], daemon=True).start()
        with running(ray_config(tmp_path, port, replica.server_port, prefix="/toy"), port, "--own", own):
            until(lambda: get(port, "/toy" + READY)[0] == 200)
            assert get(port, "/other/v2/models/other/ready")[0] == 503
            assert get(port, "/other")[0] == 503
            status, _, answer = get(port, READY)
            assert (status, answer["error"]) == (
                404,
                "nothing is served at this path; the codecs are at /toy, /other",
            )
            assert get(port, "/others/v2")[0] == 404
        replica.shutdown()


def test_on_a_shared_cluster_only_the_paths_of_the_protocol_are_503(tmp_path: Path) -> None:
    """There the routes of the codecs are unknown to HAProxy, and other applications may come and go."""
    port = free_port()
    with running(ray_config(tmp_path, port, None), port):
        assert get(port, "/toy" + READY)[0] == 503
        assert get(port, "/toy/v2")[0] == 503
        assert get(port, "/shop/basket")[0] == 404


@pytest.mark.parametrize(
    ("path", "status", "text"), [("/-/routes", 404, "nothing is served"), ("/v2", 503, "no replica")]
)
def test_its_own_errors_are_json(tmp_path: Path, path: str, status: int, text: str) -> None:
    port = free_port()
    with running(ray_config(tmp_path, port, free_port()), port):
        until(lambda: not any_replica(port))
        found, headers, answer = get(port, path)
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert text in answer["error"]
    assert headers["Retry-After"] == ("1" if status == 503 else None)


class HealthyUntilPost(socketserver.ThreadingTCPServer):
    """Answers health checks, and hangs up on any POST as soon as `hang_up` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        self.posted, self.hang_up = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), HealthyUntilPostHandler)


class HealthyUntilPostHandler(socketserver.BaseRequestHandler):
    server: HealthyUntilPost

    def handle(self) -> None:
        if self.request.recv(10_000).startswith(b"POST"):
            self.server.posted.set()
            self.server.hang_up.wait(60)
        else:
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(("rest", "status", "text"), [(b"nonsense\r\n", 400, "HTTP/1.1"), (b"", 502, "replica")])
def test_errors_in_the_middle_of_a_request_are_json(tmp_path: Path, rest: bytes, status: int, text: str) -> None:
    """The replica takes the request; then a chunk of the body is malformed, or the replica hangs up."""
    port = free_port()
    with HealthyUntilPost() as replica:
        serving = threading.Thread(target=replica.serve_forever, args=[0.05])
        serving.start()
        config = ray_config(tmp_path, port, replica.server_address[1])
        with running(config, port), socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert replica.posted.wait(60)
            client.sendall(rest)
            if not rest:
                replica.hang_up.set()
            response = http.client.HTTPResponse(client)
            response.begin()
            answer = json.loads(response.read())
            response.close()
        replica.hang_up.set()
        replica.shutdown()
        serving.join(10)
    assert (response.status, response.headers["Content-Type"]) == (status, "application/json")
    assert text in answer["error"]


def test_check_that_takes_too_long_does_not_bring_rays_own_answers_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(command: list[str], *_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    path = ray_config(tmp_path, free_port(), None)
    monkeypatch.setattr(haproxy_wrapper.subprocess, "run", too_slow)
    prepare("haproxy", path)
    assert path.read_text().startswith(MARK)
    assert "not found. Ping" not in path.read_text()
