"""The processes of a measurement: how they are started, and what they take of the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dat_service.launch import READY, RunningProcess, running_service

ROOT = Path(__file__).parents[1]

# Ray writes an actor's class into the title of its process, as in `ray::ServeReplica:tiny-f8:codec`.
ROLE_OF_ACTOR = {
    "ServeReplica": "replica",
    "ProxyActor": "proxy",
    "HAProxyManager": "proxy",
    "ServeController": "controller",
}


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's variables without DAT_*, RAY_ADDRESS and the HAProxy switch, and with `more`.

    Benchmarks measure the defaults, whatever the operator has set for another service. Python finds this
    repository.
    """
    kept_variables = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith("DAT_") or name == "DAT_HOME")
        and name not in ("RAY_ADDRESS", "RAY_SERVE_ENABLE_HA_PROXY")
    }
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept_variables | {"PYTHONPATH": os.pathsep.join(paths)} | dict(more or {})


@contextlib.contextmanager
def dat_serve(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[RunningProcess]:
    """Runs `dat serve` with these arguments and a clean environment, to which `env` is added."""
    with running_service(*arguments, env=clean_environment(env)) as service:
        yield service


def print_ready() -> None:
    """Prints the line that `running_process` waits for."""
    print(READY, flush=True)


def print_ready_once_open(port: int) -> None:
    """Prints that line from a thread, as soon as the port is open: for servers that do not say when they are up."""

    def wait() -> None:
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return print_ready()
            time.sleep(0.1)

    threading.Thread(target=wait, daemon=True).start()


def family(pid: int) -> list[psutil.Process]:
    """Returns the process and all its descendants that still live."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def role(process: psutil.Process) -> str:
    """Returns what a process of `dat serve` does.

    That is service, replica, proxy, controller, haproxy, raylet or gcs_server, "ray" for any other, and "" for one
    that has ended.
    """
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        name: str = process.name()
        command: list[str] = process.cmdline()
    except psutil.Error:
        return ""
    title = command[0] if command else name
    if title.startswith("ray::"):
        for actor, found in ROLE_OF_ACTOR.items():
            if actor in title:
                return found
    if name in ("haproxy", "raylet", "gcs_server"):
        return name
    return "service" if "dat_service.cli" in command else "ray"


def in_role(pid: int, wanted: str) -> list[psutil.Process]:
    """Returns those processes of a service that have this role."""
    return [process for process in family(pid) if role(process) == wanted]


@dataclass(frozen=True)
class ResourceUsage:
    """The resident bytes and open file descriptors of one process."""

    role: str
    resident_bytes: int
    open_files: int


def resource_usage(pid: int) -> dict[int, ResourceUsage]:
    """Returns the usage of the process and of all its descendants, by process id."""
    usage = {}
    for process in family(pid):
        process_role = role(process)
        if not process_role:
            continue
        with contextlib.suppress(psutil.Error):
            usage[process.pid] = ResourceUsage(process_role, process.memory_info().rss, process.num_fds())
    return usage


class CpuShare:
    """Measures which share of the cores' time, 0..1, is used while the block runs: `share`."""

    share = 0.0

    def __enter__(self) -> CpuShare:
        self._before = psutil.cpu_times()
        return self

    def __exit__(self, *_: object) -> None:
        before, after = self._before, psutil.cpu_times()
        spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
        # guest time is counted in user time already
        total = sum(value for name, value in spent.items() if not name.startswith("guest"))
        idle = spent["idle"] + spent.get("iowait", 0.0)
        self.share = 1 - idle / total if total > 0 else 0.0


def wait_until(condition: Callable[[], bool], timeout_s: float, description: str) -> None:
    """Polls `condition()` until it is true. Raises TimeoutError, with the description, if it stays false."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {description}")
        time.sleep(0.05)
