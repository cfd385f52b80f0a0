"""Updating and stopping a service, without Ray: neither may start one, and each waits for the other."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dat_service.cli.serve import run_updates
from dat_service.ports import BLOCK, is_free, take_block
from dat_service.ray.service import RayService, ServeFailed
from dat_service.settings import Settings
from dat_service.signals import Requests, handled_signals, requested_by_signals
from dat_workers.system.signals import delayed_signals


@pytest.fixture
def rays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretends that no Ray runs, and records each attempt to start one."""
    started: list[str] = []

    def init(*_: Any, **__: Any) -> None:
        started.append("ray")
        raise RuntimeError("a Ray was started")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    return started


def test_nothing_but_start_starts_a_ray(rays: list[str]) -> None:
    service = RayService(Settings(codec="identity"))
    assert service._why(RuntimeError("the first error")) == "the first error"
    with pytest.raises(ServeFailed, match="stopping"):
        service.update()
    service.stop()
    with pytest.raises(ServeFailed, match="stopping"):
        service.update()
    assert rays == []


def test_a_ray_that_does_not_start_is_asked_for_nothing(rays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    service = RayService(Settings(codec="identity"))
    with pytest.raises(ServeFailed, match="a Ray was started"):
        service.start()
    service.stop()
    assert rays == ["ray"]


def test_no_update_begins_once_it_stops(rays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` waits for a running call to Serve, and no call is made after it."""
    service = RayService(Settings(codec="identity"))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("dat_service.ray.service._shut_down_serve", lambda: None)
    stopping = threading.Thread(target=service.stop)
    with service._changes:
        stopping.start()
        while not service._stopping:
            pass
        assert stopping.is_alive()
    stopping.join(60)
    with pytest.raises(ServeFailed, match="stopping"):
        service.update()


def test_one_codec_that_does_not_end_keeps_no_other(rays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    service = RayService(Settings(codec="identity"), Settings(codec="tiny-f8"))
    service._running = ["identity", "tiny-f8"]
    deleted = []

    def delete(codec: str) -> None:
        if codec == "identity":
            raise RuntimeError("no controller")
        deleted.append(codec)

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.serve.delete", delete)
    with pytest.raises(ServeFailed, match="identity: no controller"):
        service.stop()
    assert deleted == ["tiny-f8"]
    service.stop()  # has nothing left to do


def test_updates_wanted_during_one_are_one_more() -> None:
    began, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def update() -> None:
        began.release()
        go_on.acquire()

    wanted = Requests()
    threading.Thread(target=run_updates, args=[SimpleNamespace(update=update), wanted], daemon=True).start()
    wanted.put("update")
    assert began.acquire(timeout=60)
    for _ in range(3):
        wanted.put("update")
    go_on.release()
    assert began.acquire(timeout=60)
    go_on.release()
    assert not began.acquire(timeout=0.2)


def test_update_that_fails_unexpectedly_is_not_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    tried = threading.Semaphore(0)

    def update() -> None:
        tried.release()
        raise KeyError("of the store")

    wanted = Requests()
    threading.Thread(target=run_updates, args=[SimpleNamespace(update=update), wanted], daemon=True).start()
    for _ in range(2):
        wanted.put("update")
        assert tried.acquire(timeout=60)


@pytest.fixture
def hangups() -> Iterator[None]:
    """Restores the handler of SIGHUP, which `handled_signals` leaves ignored."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_signal_for_an_update_while_it_starts_and_while_it_ends(hangups: None) -> None:
    """The codec may have been read before the signal, so the request is kept until the service has started."""
    requests = Requests()
    with handled_signals(requests):
        os.kill(os.getpid(), signal.SIGHUP)
        with requested_by_signals(requests):
            assert requests.get(timeout=1) == "update"
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert [requests.get(timeout=1), requests.get(timeout=1)] == ["stop", "update"]
        os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_start_is_interrupted_by_sigterm_and_by_a_closed_terminal(
    hangups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), handled_signals(Requests()):
        os.kill(os.getpid(), signal.SIGTERM)
    terminal = [True, False]
    monkeypatch.setattr("dat_service.signals.has_terminal", lambda: terminal.pop(0))
    with pytest.raises(KeyboardInterrupt), handled_signals(Requests()):
        os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_neither_ctrl_c_nor_a_closed_terminal_interrupts_rays_start(
    number: signal.Signals, hangups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal: list[bool] = []
    monkeypatch.setattr("dat_service.signals.has_terminal", lambda: terminal.pop(0))
    started = []

    def start(why: Exception | None) -> None:
        with handled_signals(Requests()):
            with delayed_signals():
                os.kill(os.getpid(), number)
                started.append("ray")
                if why is not None:
                    raise why
            started.append("serve")

    for why in (None, RuntimeError("Ray did not start")):
        terminal[:] = [True, False]
        with pytest.raises(KeyboardInterrupt):
            start(why)
    assert started == ["ray", "ray"]


def test_a_block_of_ports_is_one_services() -> None:
    with take_block(8000) as one, take_block(8000) as other:
        first, second = one.getsockname()[1], other.getsockname()[1]
        assert abs(first - second) >= BLOCK
        assert not is_free(first)
        assert is_free(first + 1)
    assert is_free(first)
