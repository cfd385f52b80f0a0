"""Plain sockets with one buffer for each connection: nothing is parsed or allocated, so no server can be faster.

A message is its length in 8 bytes, followed by its bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading

from benchmarks.processes import print_ready

LENGTH = struct.Struct("!Q")


def echo(connection: socket.socket) -> None:
    """Sends every message of a connection back, until the connection ends."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray())
    with connection:
        while head := connection.recv(LENGTH.size, socket.MSG_WAITALL):
            (size,) = LENGTH.unpack(head)
            if len(buffer) < size:
                buffer = memoryview(bytearray(size))
            at = 0
            while at < size:
                at += connection.recv_into(buffer[at:size])
            connection.sendall(buffer[:size])


def main() -> None:
    with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
        print_ready()
        while True:
            threading.Thread(target=echo, args=server.accept()[:1], daemon=True).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
