"""Starts a service for a test or a script, and ends it together with every process that the service started.

from dat_service.launch import running_service

with running_service("--codec", "tiny-f8", "--local") as service:
    client = Client(service.url, "tiny-f8")
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from dat_service.ports import free_port
from dat_service.processes import descendants, end

DAT = (sys.executable, "-m", "dat_service.cli")  # the command `dat`; this form works even if it is not on PATH
READY = "ready"  # `dat serve` writes a line that begins with this word once it answers
LOG_LINES = 200


class StartFailed(RuntimeError):
    """The process ended, or was not ready in time. The message contains the last lines that the process wrote."""


@dataclass
class RunningProcess:
    """A process that has written its "ready" line, and the lines that it has written so far."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """The last 200 of the `lines`, joined to one string."""
        return "".join(self.lines[-LOG_LINES:])


@contextlib.contextmanager
def running_service(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    stderr: int | None = subprocess.STDOUT,
) -> Iterator[RunningProcess]:
    """Runs `dat serve` with these arguments on a free port while the block of the `with` statement runs.

    The parameters and errors are those of `running_process`.

    >>> with running_service("--codec", "identity", "--local") as service:    # doctest: +SKIP
    ...     print(service.url)
    http://127.0.0.1:43210
    """
    port = free_port()
    command = [*DAT, "serve", "--port", str(port), *arguments]
    with running_process(command, f"http://127.0.0.1:{port}", env=env, stderr=stderr) as service:
        yield service


@contextlib.contextmanager
def running_process(
    command: Sequence[str],
    url: str = "",
    *,
    env: Mapping[str, str] | None = None,
    stderr: int | None = subprocess.STDOUT,
    start_timeout_s: float = 300,
    stop_timeout_s: float = 90,
) -> Iterator[RunningProcess]:
    """Runs a server while the block of the `with` statement runs, and then ends the server with SIGINT.

    The server must write a line that begins with "ready" once it answers; the block begins after that line. When
    the block has ended, the server and the processes that it started have `stop_timeout_s` seconds to end after the
    SIGINT; those that still run are then killed.

    Args:
        url: The address of the server; it becomes `RunningProcess.url`.
        env: The environment variables of the server; by default, those of this process.
        stderr: By default, stderr goes into the same log as stdout. With None, it goes to the stderr of this
            process.

    Raises:
        StartFailed: The server ended, or it wrote no "ready" line within `start_timeout_s` seconds.
    """
    # With a session of its own, the server gets no SIGINT from Ctrl-C in a terminal: this process gets it and then
    # ends the server in order.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, env=env
    )
    running = RunningProcess(process, url)
    ready_or_ended = threading.Event()
    reader = threading.Thread(target=_read, args=(running, ready_or_ended), daemon=True)
    reader.start()
    try:
        if not ready_or_ended.wait(start_timeout_s):
            raise StartFailed(f"{' '.join(command)}: not ready after {start_timeout_s:g} s\n{running.log}")
        if not any(line.startswith(READY) for line in running.lines):
            raise StartFailed(f"{' '.join(command)}: ended with status {process.wait(10)}\n{running.log}")
        yield running
    finally:
        _end(process, stop_timeout_s)
        reader.join(10)
        if process.stdout is not None:
            process.stdout.close()


def _read(running: RunningProcess, ready_or_ended: threading.Event) -> None:
    assert running.process.stdout is not None
    for line in running.process.stdout:
        running.lines.append(line)
        if line.startswith(READY):
            ready_or_ended.set()
    ready_or_ended.set()


def _end(process: subprocess.Popen[str], timeout_s: float) -> None:
    """Sends SIGINT to the process, and kills it and those of its descendants that still run `timeout_s` later."""
    deadline = time.monotonic() + timeout_s
    started: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        started = descendants(psutil.Process(process.pid).children())
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end(started, max(0.0, deadline - time.monotonic()))
