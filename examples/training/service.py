"""A running service: the given one, or one of our own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dat_client import Client

START_S = 180.0


@contextmanager
def service(url: str | None, codec: str, *, local: bool = True, quiet: bool = False) -> Iterator[str]:
    """The address of a running service: `url`, or one that is started here and stopped at the end.

        with service(None, "tiny-f8") as url, Client(url, "tiny-f8") as client:
            ...

    Args:
        local: start it in one process, without Ray.
        quiet: leave out what it prints (not what it complains of).

    Exits with a message where the service does not start.
    """
    if url:
        yield url
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "dat_service.cli", "serve", "--codec", codec, "--port", str(port)]
    # A session of its own: Ctrl-C reaches the trainer alone, which stops the service when it has ended. OpenMP's
    # threads must not spin while they wait: on two busy cores (load 6 to 7), four requests at once (16 pictures
    # of 48² each) took 6.4 s with spinning and 2.2 s without, single ones up to 4.2 s and 0.5 s (one run of each).
    process = subprocess.Popen(
        command + (["--local"] if local else []),
        stdout=subprocess.DEVNULL if quiet else None,
        start_new_session=True,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_ready(address, codec, process)
        yield address
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_ready(url: str, codec: str, process: subprocess.Popen[bytes]) -> None:
    with Client(url, codec) as client:
        deadline = time.monotonic() + START_S
        while not client.ready():
            if process.poll() is not None:
                sys.exit(f"the service ended with status {process.returncode}")
            if time.monotonic() > deadline:
                sys.exit(f"the service was not ready within {START_S:g} s")
            time.sleep(0.2)
