"""Handles the signals of `dat serve`: SIGINT and SIGTERM stop the service, and SIGHUP updates it."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dat_workers.system.signals import handle_signals

UPDATE, STOP = "update", "stop"
Requests = queue.SimpleQueue[str]  # no other kind of queue allows put() in a signal handler


@contextmanager
def handled_signals(requests: Requests) -> Iterator[None]:
    """Handles the signals of `dat serve` from its beginning to its end; `requested_by_signals` is used inside.

    SIGINT and SIGTERM raise KeyboardInterrupt, and so does the SIGHUP of a closed terminal. Any other SIGHUP puts
    "update" into the queue, for when the service has started: the codec may have been read before the signal.
    After the block, SIGHUP is ignored, because the process is about to end and must not be ended by a signal.
    """
    is_update = _tell_hangups_apart()

    def on_signal(number: int, _: object) -> None:
        if not is_update(number):
            raise KeyboardInterrupt
        requests.put(UPDATE)

    # A handler and not SIG_IGN, which Ray's processes would inherit. SIGINT has such a handler already.
    signal.signal(signal.SIGHUP, on_signal)
    try:
        with handle_signals(on_signal, signal.SIGTERM):
            yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextmanager
def requested_by_signals(requests: Requests) -> Iterator[None]:
    """Puts "stop" into the queue for SIGINT and SIGTERM, and "update" for SIGHUP.

    When a terminal is closed, it sends SIGHUP too; in that case, the queue gets "stop". After a "stop", the next
    signal that means "stop" raises KeyboardInterrupt.
    """
    stopping = False
    is_update = _tell_hangups_apart()

    def on_signal(number: int, _: object) -> None:
        nonlocal stopping
        if is_update(number):
            requests.put(UPDATE)
        elif stopping:
            raise KeyboardInterrupt
        else:
            stopping = True
            requests.put(STOP)

    with handle_signals(on_signal, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


def _tell_hangups_apart() -> Callable[[int], bool]:
    """Returns a function that tells whether a signal asks for an update.

    A SIGHUP does, unless it comes from a terminal that was open now and has been closed.
    """
    had_terminal = has_terminal()
    return lambda number: number == signal.SIGHUP and (has_terminal() or not had_terminal)


def has_terminal() -> bool:
    """Returns True if this process belongs to a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
