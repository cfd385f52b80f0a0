"""Connects to the Ray cluster at an address, or says within seconds why there is none."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from dat_workers.system.signals import delayed_signals

CHECK_S = 5.0  # resolving the name, connecting and the first answer may together take so long
CONNECT_S = 60.0  # the same for joining a cluster that has answered
CLIENT_PORT = 10001  # of ray://HOST
JOINING_THREAD = "ray-join"

# Ray's own ports speak gRPC, so HTTP/2 (RFC 9113, section 3.4): each side begins with a SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4
FRAME_HEADER_BYTES = 9


class NoCluster(ConnectionError):
    """No Ray cluster answers at the address."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(
            f"RAY_ADDRESS is {address!r}, but no Ray cluster can be reached there: {reason}; correct the address, "
            "start that cluster (ray start --head), or unset RAY_ADDRESS to start a Ray on this machine"
        )


def connect_ray(address: str | None) -> None:
    """Joins the Ray cluster at `address`, or starts a Ray on this machine if that is None.

    Raises the errors of `join_cluster`.
    """
    options: Any = {"configure_logging": False, "log_to_driver": False, "namespace": "dat"}
    if address is not None:
        join_cluster(address, **options)
        return
    import ray

    with delayed_signals():
        ray.init(address="local", include_dashboard=False, **options)


def join_cluster(address: str, **options: Any) -> None:
    """Calls ray.init(address=address, **options) after `check_cluster`.

    Signals are handled at all times, because the calling thread only waits: where nobody answers, Ray itself stays
    inside a single call for minutes. Raises NoCluster, also if Ray has not connected after 60 s, and the errors of
    ray.init.
    """
    check_cluster(address)
    import ray

    given_up = threading.Event()

    def connect() -> None:
        ray.init(address=address, **options)
        if given_up.is_set():
            ray.shutdown()

    worker_log = logging.getLogger("ray._private.worker")
    worker_log.addFilter(_is_not_about_the_thread)
    try:
        late = NoCluster(address, f"it answers, but joining it took more than {CONNECT_S:g} s")
        _wait_for(connect, CONNECT_S, late, JOINING_THREAD)
    except BaseException:
        given_up.set()
        raise
    finally:
        worker_log.removeFilter(_is_not_about_the_thread)


def is_joining() -> bool:
    """Returns True if a thread that was left behind is still inside ray.init.

    The process must then be ended by os._exit: Python's usual end takes from Ray's threads what they use, and in a
    quarter of the cases the process crashed (std::bad_alloc).
    """
    return any(thread.name == JOINING_THREAD for thread in threading.enumerate())


def check_cluster(address: str) -> None:
    """Raises NoCluster unless a gRPC server, as Ray is one, answers at the address within 5 s.

    Only HOST:PORT and ray://HOST[:PORT] are checked; with any other address, such as "auto", ray.init itself fails
    at once.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port
    except ValueError as error:
        raise NoCluster(address, str(error)) from None
    if parts.scheme == "ray":
        port = port or CLIENT_PORT
    if parts.scheme not in ("", "ray") or port is None or not parts.hostname:
        return
    host = parts.hostname
    try:
        _wait_for(lambda: _greet(host, port), CHECK_S, TimeoutError())
    except NotRay as error:
        raise NoCluster(address, str(error)) from None
    except TimeoutError:
        raise NoCluster(address, f"no answer within {CHECK_S:g} s") from None
    except (OSError, UnicodeError) as error:
        raise NoCluster(address, getattr(error, "strerror", None) or str(error)) from None


class NotRay(Exception):
    """Another program than Ray answers."""


def _greet(host: str, port: int) -> None:
    """Connects, and reads the beginning of the first frame. Raises OSError, and NotRay for anything else."""
    with socket.create_connection((host, port), timeout=CHECK_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(PREFACE)
        answer = b""
        while len(answer) < FRAME_HEADER_BYTES and (received := connection.recv(FRAME_HEADER_BYTES - len(answer))):
            answer += received
        if len(answer) < FRAME_HEADER_BYTES or answer[3] != SETTINGS:
            raise NotRay(f"another program listens there, its answer begins with {answer!r}")


def _wait_for(task: Callable[[], None], limit_s: float, late: Exception, name: str | None = None) -> None:
    """Runs a task in a thread and waits for it; raises its error, or `late` after `limit_s` seconds.

    The thread is then left behind. It does not keep the process from ending.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            task()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        outcome.result(limit_s)
    except TimeoutError:
        if outcome.done():  # the error of the task itself
            raise
        raise late from None


def _is_not_about_the_thread(record: logging.LogRecord) -> bool:
    """Returns False for Ray's warning that it handles no SIGTERM outside of the main thread: the caller does."""
    return "SIGTERM handler" not in record.getMessage()
