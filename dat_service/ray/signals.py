"""Handles the signals of `dat serve` on Ray: SIGINT and SIGTERM stop the service, and SIGHUP updates it."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dat_workers.system.signals import handle_signals


@contextmanager
def requested_by_signals() -> Iterator[queue.SimpleQueue[str]]:
    """Yields a queue that gets "stop" for SIGINT and SIGTERM, and "update" for SIGHUP.

    When a terminal is closed, it sends SIGHUP too; in that case, the queue gets "stop". After a "stop", the next
    signal that means "stop" raises KeyboardInterrupt.
    """
    # No other kind of queue allows put() in a signal handler.
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    stopping = False
    had_terminal = has_terminal()

    def on_signal(number: int, _: object) -> None:
        nonlocal stopping
        if number == signal.SIGHUP and (has_terminal() or not had_terminal):
            requests.put("update")
        elif stopping:
            raise KeyboardInterrupt
        else:
            stopping = True
            requests.put("stop")

    with handle_signals(on_signal, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield requests


@contextmanager
def updates_ignored() -> Iterator[None]:
    """Ignores SIGHUP in the block, which starts the service.

    Raises KeyboardInterrupt if the SIGHUP means that the terminal has been closed.
    """
    had_terminal = has_terminal()

    def on_hangup(_: int, __: object) -> None:
        if had_terminal and not has_terminal():
            raise KeyboardInterrupt

    with handle_signals(on_hangup, signal.SIGHUP):  # a handler and not SIG_IGN, which Ray's processes would inherit
        yield


def has_terminal() -> bool:
    """Returns True if this process belongs to a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
