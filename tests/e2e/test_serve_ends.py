"""However `dat serve` on Ray ends, it leaves no processes behind.

Slow: `python -m pytest -m slow tests/e2e/test_serve_ends.py`
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from dat_service.processes import descendants, runs
from tests.conftest import DAT, dat_serve, free_port
from tests.e2e.request_threads import infer_body

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def until(check: Callable[[], bool], patience_s: float = 200) -> None:
    deadline = time.monotonic() + patience_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def starting() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*DAT, "serve", "--codec", "identity", "--port", str(free_port())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Reads the process's output up to a line that begins with `word`, or up to its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return


def family(pid: int) -> set[psutil.Process]:
    return descendants(psutil.Process(pid).children())


def check_gone(processes: set[psutil.Process], patience_s: float) -> None:
    until(lambda: not any(map(runs, processes)), patience_s)


@pytest.mark.parametrize("so_many", [4, 8, 12])
def test_interrupted_while_it_starts(so_many: int) -> None:
    """The interrupt comes once that many processes have been started."""
    with starting() as process:
        until(lambda: len(family(process.pid)) >= so_many)
        begun = family(process.pid)
        os.kill(process.pid, signal.SIGINT)
        output = process.communicate(timeout=200)[0]
        assert process.returncode in (1, 130), output
        assert "Traceback" not in output
        check_gone(begun, 1)


def test_interrupted_while_it_stops() -> None:
    with starting() as process:
        wait_for(process, "ready")
        begun = family(process.pid)
        os.kill(process.pid, signal.SIGINT)
        wait_for(process, "stopping")
        os.kill(process.pid, signal.SIGINT)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 130, output
        assert "interrupted" in output
        check_gone(begun, 1)


def test_killed() -> None:
    """Ray ends the processes of a dead driver, and HAProxy ends with the actor that started it."""
    with starting() as process:
        wait_for(process, "ready")
        begun = family(process.pid)
        process.kill()
        process.wait()
        check_gone(begun, 120)


def test_requests_under_way_are_answered() -> None:
    """Half of a request has arrived when the service is told to stop; the other half arrives while it stops."""
    images = np.zeros((2, 3, 32, 32), np.uint8)
    body, headers = infer_body(images)
    with dat_serve("--codec", "identity") as (url, process):
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=60)
        try:
            connection.request("GET", "/v2/health/ready")
            connection.getresponse().read()
            connection.putrequest("POST", "/v2/models/identity/infer")
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                connection.putheader(name, value)
            connection.endheaders(body[:1000])
            time.sleep(0.5)  # for the replica to take it
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(1)
            connection.send(body[1000:])
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert images.tobytes() in response.read()
        finally:
            connection.close()
        assert process.wait(90) == 0


def test_signal_for_an_update_while_it_stops() -> None:
    with dat_serve("--codec", "identity") as (_, process):
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(90) == 0
