"""RAY_ADDRESS without a cluster: `dat serve` and `dat precompute --ray` name it at once, and obey signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.processes import wait_until
from tests.conftest import DAT, free_port

Command = list[str]


@pytest.fixture(params=["serve", "precompute"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Command:
    if request.param == "serve":
        return [*DAT, "serve", "--codec", "identity", "--port", str(free_port())]
    (tmp_path / "src" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "src" / "cat" / "1.png")
    return [*DAT, "precompute", str(tmp_path / "src"), str(tmp_path / "dst"), "--codec", "identity", "--ray"]


def fails(command: Command, address: str) -> str:
    """Returns stderr of the command, which must end with status 1, and within 10 s of `dat --help`'s time."""
    begun = time.monotonic()
    subprocess.run([*command[:4], "--help"], capture_output=True, check=True)
    start_s = time.monotonic() - begun
    begun = time.monotonic()
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"RAY_ADDRESS": address}
    )
    assert ended.returncode == 1, ended.stderr
    assert time.monotonic() - begun < 10 + 2 * start_s
    return ended.stderr


def test_refused_port(command: Command) -> None:
    address = f"127.0.0.1:{free_port()}"
    message = fails(command, address)
    assert f"RAY_ADDRESS is '{address}', but no Ray cluster can be reached there: Connection refused" in message


def test_port_that_never_answers(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        message = fails(command, f"ray://127.0.0.1:{black_hole.getsockname()[1]}")
    assert "no answer within 5 s" in message


def test_unknown_name(command: Command) -> None:
    assert "RAY_ADDRESS is 'no-such-host.invalid:6379'" in fails(command, "no-such-host.invalid:6379")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_ray_hangs(command: Command, number: signal.Signals) -> None:
    """The port answers like gRPC and then no more, so that ray.init itself waits."""
    connections: list[socket.socket] = []

    def accept(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                connections[-1].sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))

    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        process = stack.enter_context(
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"},
            )
        )  # fmt: skip
        stack.callback(process.kill)
        threading.Thread(target=accept, args=[server], daemon=True).start()
        wait_until(lambda: len(connections) >= 2, 100, "the address was checked twice, and Ray connects")
        time.sleep(4)
        signalled = time.monotonic()
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
        seconds = time.monotonic() - signalled
        for connection in connections:
            connection.close()
    assert process.returncode == 130, message
    assert "interrupted" in message
    assert seconds < 10
