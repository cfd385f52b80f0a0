"""Handles signals during a block, or delays them while a library starts that would crash if it were interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Calls `handler` for these signals until the block ends, and then restores the previous handlers."""
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, restored in earlier.items():
            signal.signal(number, restored)


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Delays Ctrl-C, SIGTERM and SIGHUP (a closed terminal) until the block has ended.

    It protects the start of Ray: if Ray is interrupted while it starts, it crashes later when it is shut down. Ray
    also installs its own SIGTERM handler, which is replaced by the previous one when the block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    # Only Python handlers can raise an exception in the block; default actions and ignored signals stay unchanged.
    handlers = {n: handler for n in SIGNALS if callable(handler := signal.getsignal(n))}
    try:
        with handle_signals(lambda number, _: received.append(number), *handlers):
            yield
    finally:
        for number, handler in handlers.items():
            if number in received:
                handler(number, None)
