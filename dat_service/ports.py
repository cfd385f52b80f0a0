"""Finds free TCP ports."""

from __future__ import annotations

import contextlib
import socket

BLOCK = 100  # ports that a service reserves: one to hold the block, the others for its replicas


def take_block(port: int) -> socket.socket:
    """Reserves 100 free ports for the service on `port`, until the returned socket is closed.

    The socket is bound to the first port of the block; the others are for replicas. Raises OSError if no block is
    free. Ray numbers the ports of replicas from 30000 in every cluster and opens them with SO_REUSEPORT, so two
    clusters on one machine would get some of each other's requests. Blocks lie below the ports that Linux assigns
    to outgoing connections.
    """
    for i in range(200):
        first = 10_000 + (port + i) % 200 * BLOCK
        holder = socket.socket()
        with contextlib.suppress(OSError):
            holder.bind(("", first))  # only one process can
            if all(is_free(p) for p in range(first + 1, first + BLOCK)):
                return holder
        holder.close()
    raise OSError("no 100 free ports in a row between 10000 and 30000 for the replicas")


def is_free(port: int) -> bool:
    """Whether no process on this machine listens on a TCP port."""
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Returns a TCP port that no process listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
