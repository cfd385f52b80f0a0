"""dat-haproxy with the configuration that the installed Ray Serve writes, in front of a stand-in replica."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dat_service.ray.haproxy import SERVE
from dat_service.ray.haproxy_wrapper import MARK, amend, binary, prepare
from tests.conftest import free_port


def ray_config(folder: Path, port: int, replica: int | None, *, prefix: str = "/", fallback: int = 1) -> Path:
    """Writes Ray Serve's configuration for one application with one replica, or with replica=None for none.

    A health check fails after 500 ms. With 100 ms, the checks of a stand-in that shares a busy machine with other
    tests failed twice in a row now and then, and HAProxy cut off the request that it was answering.
    """
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        metrics_port=free_port(),
        stats_port=free_port(),
        health_check_inter="500ms",
        health_check_fastinter="50ms",
        health_check_fall=int(SERVE["RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL"]),
        observe_mark_down_enabled=False,
    )
    backend = BackendConfig(
        name="http-toy",
        path_prefix=prefix,
        app_name="toy",
        servers=[ServerConfig("SERVE_REPLICA__toy-codec-1", "127.0.0.1", replica or 1)],
        fallback_server=ServerConfig("SERVE_PROXY_ACTOR-1", "127.0.0.1", fallback),
    )
    backends = {} if replica is None else {"http-toy": backend}
    api = HAProxyApi(config, backends, config_file_path=str(folder / "haproxy.cfg"))
    api.set_backend_configs(backends)
    api._generate_config_file_internal()
    return folder / "haproxy.cfg"


class StandInReplica(http.server.ThreadingHTTPServer):
    """Responds with the headers it received; `health` is 200 (healthy), 503 (stopping) or 0 (no answer)."""

    daemon_threads = True

    def __init__(self) -> None:
        self.health = 200
        self.hang = threading.Event()
        self.inside = threading.Event()
        self.checks = 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: StandInReplica

    def do_GET(self) -> None:
        status, body = 200, json.dumps([[k.lower(), v] for k, v in self.headers.items()]).encode()
        if self.path == "/-/healthz":
            status = self.server.health
            self.server.checks += 1
        if self.path == "/wait":
            self.server.inside.set()
        if self.path == "/wait" or not status:
            self.server.hang.wait(60)
            self.close_connection = True
            if not status:
                return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(OSError):  # the connection may be closed already
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running(path: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `dat-haproxy` with a configuration, as Ray starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dat_service.ray.haproxy_wrapper", *arguments, "-db", "-f", str(path)],
        stderr=subprocess.PIPE,
        env=os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": "/names/the/wrapper/itself"},
    )
    try:
        deadline = time.monotonic() + 60
        while not listens(port):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def replica() -> Iterator[StandInReplica]:
    with StandInReplica() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield server
        server.hang.set()
        server.shutdown()
        thread.join(10)


def get(port: int, path: str = "/", headers: list[tuple[str, bytes]] | None = None) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest("GET", path)
        for name, value in headers or []:
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def any_replica(port: int) -> bool:
    """Whether HAProxy counts a replica as alive; it answers this request itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/-/healthz")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def until(check: Any) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_strangers_send_does_not_reach_serve(tmp_path: Path, replica: StandInReplica) -> None:
    port = free_port()
    with running(ray_config(tmp_path, port, replica.server_port), port):
        sent = [
            ("X-Request-Disconnect-Disabled", b"?0"),
            ("x-request-disconnect-disabled", b"\xff"),
            ("X-Forwarded-For", b"1.2.3.4"),
            ("x-request-timeout-seconds", b"0.001"),
            ("serve_multiplexed_model_id", b"\xff"),
            ("x-session-id", b"\xff"),
            ("X-Request-Id", b"\xff"),
            ("X-Dat-Client", b"me"),
        ]
        status, _, got = get(port, headers=sent)
        assert status == 200
        got = [(name, value) for name, value in got if name not in ("host", "accept-encoding", "connection")]
        assert sorted(got) == [
            ("x-dat-client", "me"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-request-disconnect-disabled", "?1"),
        ]
        for usable in (b"run-7/step-12", b"a,b", b"!~", b"x" * 64):
            _, _, got = get(port, headers=[("X-Request-Id", usable)])
            assert ["x-request-id", usable.decode()] in got
        for ids in ([b"run 7"], [b"x" * 65], [b""], [b"one", b"two"]):
            _, _, got = get(port, headers=[("X-Request-Id", value) for value in ids])
            assert "x-request-id" not in dict(got), ids


def test_headers_have_their_limit(tmp_path: Path, replica: StandInReplica) -> None:
    """Of HAProxy's buffer of 16 KiB, 1 KiB is reserved for what it adds itself (docs/safety.md)."""
    port = free_port()
    with running(ray_config(tmp_path, port, replica.server_port), port):
        assert get(port, headers=[("X-Large", b"x" * 15_000)])[0] == 200
        with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 15_400 + b"\r\n\r\n")
            assert s.recv(1000).startswith(b"HTTP/1.1 4")


def test_serves_list_of_routes_is_hidden(tmp_path: Path, replica: StandInReplica) -> None:
    port = free_port()
    path = ray_config(tmp_path, port, replica.server_port)
    assert "/-/routes" in path.read_text()  # Ray's own answer to it
    with running(path, port):
        for path_variant in ("/-/routes", "/-/ROUTES"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path_variant)
            response = connection.getresponse()
            assert (response.status, b"toy" in response.read()) == (404, False)
            connection.close()


def test_rays_metrics_count_known_methods_only(tmp_path: Path, replica: StandInReplica) -> None:
    """One permanent series for each method that clients make up would be a memory leak."""
    port = free_port()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as metrics:
        metrics.bind(str(tmp_path / "metrics.sock"))
        metrics.settimeout(60)
        with running(ray_config(tmp_path, port, replica.server_port), port):
            for method in ("GET", "MADEUP"):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(method, "/")
                connection.getresponse().read()
                connection.close()
            log_lines: list[str] = []  # also for connections without a request, those of `running`
            while not log_lines or "MADEUP / HTTP" not in log_lines[-1]:
                log_lines.append(metrics.recv(9000).decode())
    methods = [re.findall(r' method="(\w*)"', line) for line in log_lines]
    assert [method for [method] in methods if method] == ["GET", "OTHER"]


def test_without_a_replica_the_status_is_503_with_retry_after(tmp_path: Path) -> None:
    """Such a request does not reach Serve's own proxy either."""
    port, nobody = free_port(), free_port()
    with StandInReplica() as proxy, running(ray_config(tmp_path, port, nobody, fallback=proxy.server_port), port):
        # Until then HAProxy tries to connect, and cuts the request off when it begins to count the replica as dead.
        until(lambda: not any_replica(port))
        status, headers, answer = get(port)
        assert status == 503
        assert headers["Retry-After"] == "1"
        assert "no replica" in answer["error"]
        assert proxy.checks == 0


def test_requests_on_a_stopping_replica_finish(tmp_path: Path, replica: StandInReplica) -> None:
    port = free_port()
    with running(ray_config(tmp_path, port, replica.server_port), port):
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(get(port, "/wait")[0]))
        waiting.start()
        assert replica.inside.wait(60)
        replica.health = 503
        checks_before = replica.checks
        until(lambda: replica.checks > checks_before + 5)  # far more than it takes to be down
        assert not answers
        replica.hang.set()
        waiting.join(60)
        assert answers == [200]


def test_requests_on_a_replica_that_died_end_at_once(tmp_path: Path, replica: StandInReplica) -> None:
    """If its host is gone, for example, nothing closes the connection of the waiting request."""
    port = free_port()
    path = ray_config(tmp_path, port, replica.server_port)
    with running(path, port):
        got: list[int] = []

        def ask() -> None:
            try:
                got.append(get(port, "/wait")[0])
            except ConnectionError:
                got.append(502)

        waiting = threading.Thread(target=ask)
        waiting.start()
        assert replica.inside.wait(60)
        replica.health = 0
        waiting.join(60)
        assert got == [502]  # the end of the connection says as much


def test_listens_where_it_is_told(tmp_path: Path, replica: StandInReplica) -> None:
    port, other = free_port(), free_port()
    with running(ray_config(tmp_path, port, replica.server_port), other, "--own", f"127.0.0.1:{other},/"):
        assert get(other)[0] == 200
        assert not listens(port)


def test_ends_with_the_process_that_started_it(tmp_path: Path, replica: StandInReplica) -> None:
    """An orphaned HAProxy would keep the port, and Serve's next proxy could not listen."""
    port = free_port()
    path = ray_config(tmp_path, port, replica.server_port)
    command = [sys.executable, "-m", "dat_service.ray.haproxy_wrapper", "-db", "-f", str(path)]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({command!r}, stderr=subprocess.DEVNULL)"]
    )
    until(lambda: listens(port))
    parent.kill()
    parent.wait()
    until(lambda: not listens(port))


def test_metrics_and_statistics_are_for_this_machine_alone(tmp_path: Path) -> None:
    config, missing = amend(ray_config(tmp_path, free_port(), free_port()).read_text(), tmp_path)
    assert missing == []
    binds = [line.split()[1] for line in config.splitlines() if line.split()[:1] == ["bind"]]
    assert len(binds) == 3
    assert all(bind.startswith("127.0.0.1:") for bind in binds)


def test_ports_of_metrics_and_statistics_that_are_taken_do_not_matter(tmp_path: Path) -> None:
    """HAProxy starts again after a fault, and by then any process may have taken a port that was free before."""
    port = free_port()
    path = ray_config(tmp_path, port, free_port())
    taken = [int(number) for number in re.findall(r"^ +bind \*?:(\d+)$", path.read_text(), re.M)]
    assert len(taken) == 2
    with (
        socket.create_server(("", taken[0])),
        socket.create_server(("", taken[1])),
        running(path, port, "--own", f"127.0.0.1:{port},/"),
    ):
        assert get(port, "/-/routes")[0] == 404
        assert {(tmp_path / f"{name}.sock").stat().st_mode & 0o777 for name in ("stats", "prometheus")} == {0o600}


def test_amended_once(tmp_path: Path) -> None:
    path = ray_config(tmp_path, free_port(), free_port())
    prepare(binary(), path)
    once = path.read_text()
    assert once.startswith(MARK)
    prepare(binary(), path)
    assert path.read_text() == once


def test_amendments_that_do_not_fit_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The amendments that do fit are applied all the same."""
    path = ray_config(tmp_path, free_port(), free_port())
    path.write_text(path.read_text().replace("http-check expect status 200", "http-check expect rstatus 2.."))
    prepare(binary(), path)
    assert "do not fit this Ray's configuration: servers" in capsys.readouterr().err
    assert "shutdown-sessions" not in path.read_text()  # without the other half of it, no replica could leave
    assert "option forwardfor" in path.read_text()


def test_configuration_that_haproxy_refuses_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text("frontend http_frontend\n    bind 127.0.0.1:1\n    nonsense\n")
    before = path.read_text()
    prepare(binary(), path)
    assert path.read_text() == before
    assert "HAProxy rejects" in capsys.readouterr().err
