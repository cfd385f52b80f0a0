"""Servers that only send back what they were sent: the ceiling, and how others would serve the same bytes.

    python -m benchmarks.service.peers.fastapi_echo PORT

Each as its own documentation shows it, with the fastest loop and parser that it takes; a module each, since most
want their classes at the top of one. Each writes "ready" once it answers, and ends with SIGINT.
"""

from __future__ import annotations

import socket
import threading
import time


def ready() -> None:
    """The line that `processes.started` waits for."""
    print("ready", flush=True)


def ready_once_open(port: int) -> None:
    """Says so from a thread of its own, for servers that cannot be asked."""

    def wait() -> None:
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return ready()
            time.sleep(0.1)

    threading.Thread(target=wait, daemon=True).start()
