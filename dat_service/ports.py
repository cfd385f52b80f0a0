"""Finds free TCP ports, and writes the address of a service."""

from __future__ import annotations

import contextlib
import socket

BLOCK = 100  # the number of ports that a service reserves: the first one holds the block, the rest are for replicas


def http_url(host: str, port: int) -> str:
    """Returns the URL of a service; IPv6 addresses are put in brackets.

    >>> http_url("::1", 8000)
    'http://[::1]:8000'
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def take_block(port: int) -> socket.socket:
    """Reserves a block of 100 free ports for the service on `port`, and returns the socket that holds the block.

    The socket is bound to the first port of the block, and the block stays reserved until the socket is closed. The
    99 ports above the first one are for replicas and for Serve's own proxy. Raises OSError if no block is free.

    Without such blocks, Ray numbers the ports of replicas from 30000 in every cluster and opens them with
    SO_REUSEPORT, so two clusters on one machine would get some of each other's requests. The blocks lie below the
    ports that Linux assigns to outgoing connections.
    """
    for i in range(200):
        first = 10_000 + (port + i) % 200 * BLOCK
        holder = socket.socket()
        with contextlib.suppress(OSError):
            holder.bind(("", first))  # only one process can bind to this port
            if all(is_free(p) for p in range(first + 1, first + BLOCK)):
                return holder
        holder.close()
    raise OSError("the replicas need a block of 100 free ports between 10000 and 30000, and no block is free")


def is_free(port: int) -> bool:
    """Returns True if no process on this machine is listening on TCP port `port`."""
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Returns the number of a TCP port that is free now; another process may take the port at any later moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
