"""Handles signals for the time of a block, or delays them while a library starts that does not survive them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Calls `handler` on these signals until the block has ended, and then restores the earlier handlers."""
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, restored in earlier.items():
            signal.signal(number, restored)


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Delivers Ctrl-C, SIGTERM and SIGHUP (a closed terminal) only when the block has ended.

    Ray, interrupted while it starts, crashes when it is shut down; and it sets a handler of its own for SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    # Only Python handlers raise exceptions in the block. Default actions and ignored signals stay as they are.
    handlers = {n: handler for n in SIGNALS if callable(handler := signal.getsignal(n))}
    try:
        with handle_signals(lambda number, _: received.append(number), *handlers):
            yield
    finally:
        for number, handler in handlers.items():
            if number in received:
                handler(number, None)
