"""An address without a Ray cluster is named within seconds, and signals end the wait at any time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from dat_workers.system import ray_cluster
from dat_workers.system.ray_cluster import NoCluster, check_cluster, join_cluster
from dat_workers.system.signals import handle_signals

Answer = Callable[[socket.socket], object]
SETTINGS_FRAME = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def hang_up(connection: socket.socket) -> None:
    connection.recv(1000)


def stay_silent(connection: socket.socket) -> None:
    connection.recv(1)
    while connection.recv(1000):
        pass


def speak_http1(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def say_no_more_than_the_first_frame(connection: socket.socket) -> None:
    connection.sendall(SETTINGS_FRAME)
    stay_silent(connection)


@pytest.fixture
def listener() -> Iterator[Callable[[Answer], str]]:
    """`listener(answer)` returns the address of a server that does this on each connection."""
    with ExitStack() as stack:

        def listen(answer: Answer) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def accept() -> None:
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    threading.Thread(target=serve, args=[connection], daemon=True).start()

            def serve(connection: socket.socket) -> None:
                with connection:
                    answer(connection)

            threading.Thread(target=accept, daemon=True).start()
            return f"127.0.0.1:{server.getsockname()[1]}"

        yield listen


def refused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "Connection refused"),
        (stay_silent, "no answer within 0.5 s"),
        (hang_up, "another program listens there"),
        (speak_http1, "another program listens there, its answer begins with b'HTTP/1.1 '"),
    ],
)
def test_address_without_a_cluster_is_named(
    listener: Callable[[Answer], str],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    answer: Answer | None,
    reason: str,
) -> None:
    monkeypatch.setattr(ray_cluster, "CHECK_S", 0.5)
    address = scheme + (refused_address() if answer is None else listener(answer))
    begun = time.monotonic()
    with pytest.raises(NoCluster) as refused:
        check_cluster(address)
    assert time.monotonic() - begun < 5
    assert str(refused.value).startswith(f"RAY_ADDRESS is {address!r}, but no Ray cluster can be reached there: ")
    assert reason in str(refused.value)
    assert "unset RAY_ADDRESS" in str(refused.value)


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "ray://no-such-host.invalid"])
def test_name_that_does_not_resolve_is_named(address: str) -> None:
    with pytest.raises(NoCluster, match=r"not known|resolution"):
        check_cluster(address)


def test_names_that_take_long_to_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CHECK_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    begun = time.monotonic()
    with pytest.raises(NoCluster, match="no answer within"):
        check_cluster("slow.example:6379")
    assert time.monotonic() - begun < 3


def test_what_answers_like_ray_passes(listener: Callable[[Answer], str]) -> None:
    address = listener(say_no_more_than_the_first_frame)
    check_cluster(address)
    check_cluster(f"ray://{address}")
    check_cluster("auto")
    with pytest.raises(NoCluster, match="sixthousand"):
        check_cluster("127.0.0.1:sixthousand")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_wait_for_a_ray_that_hangs(
    listener: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    entered, leave, stopped = threading.Event(), threading.Event(), threading.Event()

    def init(**_: object) -> None:
        entered.set()
        leave.wait(60)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", stopped.set)
    address = listener(say_no_more_than_the_first_frame)

    def interrupt() -> None:
        entered.wait(60)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with handle_signals(signal.default_int_handler, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        join_cluster(address)
    assert not stopped.is_set()
    leave.set()  # Ray connects after all, when nobody wants it any more
    assert stopped.wait(10)


def test_ray_that_hangs_is_given_up(listener: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch) -> None:
    leave = threading.Event()
    monkeypatch.setattr("ray.init", lambda **_: leave.wait(60))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(ray_cluster, "CONNECT_S", 0.2)
    with pytest.raises(NoCluster, match=r"joining it took more than 0\.2 s"):
        join_cluster(listener(say_no_more_than_the_first_frame))
    leave.set()


def test_errors_of_ray_arrive(listener: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise TimeoutError(f"of ray, {options['namespace']}")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(TimeoutError, match="of ray, dat"):
        join_cluster(listener(say_no_more_than_the_first_frame), namespace="dat")
