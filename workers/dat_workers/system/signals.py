"""Signals while a library starts that does not take them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Keeps Ctrl-C, SIGTERM and what a closed terminal says until the block has ended.

    Ray, interrupted while it starts, crashes when it is shut down; and it sets a handler of its own for SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    # the default, and what is ignored, stays so: neither raises
    handlers = {n: handler for n in SIGNALS if callable(handler := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, handler in handlers.items():
            if number in noted:
                handler(number, None)
