"""TCP ports that nobody listens on."""

from __future__ import annotations

import socket

BLOCK = 100  # ports a service keeps for its replicas, and one that holds them


def take_block(port: int) -> socket.socket:
    """100 free ports for the service on `port`, which are its own until this socket is closed.

    The socket is bound to the first of them and the others are for replicas; raises OSError where there are none.
    Ray numbers replicas' ports from 30000 in every cluster and opens them with SO_REUSEPORT: of two clusters on
    one machine, each would get some of the other's requests. Blocks lie below the ports that Linux gives to
    connections.
    """
    for i in range(200):
        first = 10_000 + (port + i) % 200 * BLOCK
        held = socket.socket()
        try:
            held.bind(("", first))  # which one process can do
        except OSError:
            held.close()
            continue
        if all(is_free(p) for p in range(first + 1, first + BLOCK)):
            return held
        held.close()
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
