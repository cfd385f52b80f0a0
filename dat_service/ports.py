"""TCP ports that nobody listens on."""

from __future__ import annotations

import socket

BLOCK = 100  # ports a service keeps for its replicas


def free_block(port: int) -> int:
    """The first of 100 ports for the replicas of the service on `port`; raises OSError where there are none.

    Ray numbers them from 30000 in every cluster and opens them with SO_REUSEPORT: of two clusters on one machine,
    each would get some of the other's requests. Blocks lie below the ports that Linux gives to connections.
    """
    for i in range(200):
        first = 10_000 + (port + i) % 200 * BLOCK
        if all(is_free(p) for p in range(first, first + BLOCK)):
            return first
    raise OSError("no 100 free ports in a row between 10000 and 30000 for the replicas")


def is_free(port: int) -> bool:
    """Whether nobody on this machine listens on a TCP port."""
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
