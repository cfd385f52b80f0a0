"""Takes the signals of `dat serve` on Ray: SIGINT and SIGTERM stop the service, SIGHUP updates it."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dat_workers.system.signals import handle_signals


@contextmanager
def requested_by_signals() -> Iterator[queue.SimpleQueue[str]]:
    """Yields a queue of what signals request: "stop" (SIGINT, SIGTERM) or "update" (SIGHUP).

    A second "stop" raises KeyboardInterrupt. A closed terminal also sends SIGHUP: that is a "stop".
    """
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()  # the only queue that a signal handler may put into
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
    """Ignores SIGHUP while the service starts, unless it says that the terminal was closed: KeyboardInterrupt."""
    had_terminal = has_terminal()

    def on_hangup(_: int, __: object) -> None:
        if had_terminal and not has_terminal():
            raise KeyboardInterrupt

    with handle_signals(on_hangup, signal.SIGHUP):  # a function, because Ray's processes would inherit SIG_IGN
        yield


def has_terminal() -> bool:
    """Returns whether this process belongs to a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
