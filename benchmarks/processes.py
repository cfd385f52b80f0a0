"""Processes of a measurement: started, waited for, watched, and ended with all that they began."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import psutil

from dat_service.launch import RunningProcess, running_service


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables without any DAT_*, RAY_ADDRESS or HAProxy switch, and `more`.

    What is measured are the defaults, whatever the operator has set for a service of his own.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith("DAT_") or name == "DAT_HOME")
        and name not in ("RAY_ADDRESS", "RAY_SERVE_ENABLE_HA_PROXY")
    }
    return kept | dict(more or {})


@contextlib.contextmanager
def dat_serve(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[RunningProcess]:
    """Runs `dat serve` with these arguments and otherwise by default, whatever DAT_* variables are set here."""
    with running_service(*arguments, env=clean_environment(env)) as service:
        yield service


def family(pid: int) -> list[psutil.Process]:
    """The process and all that it began, as far as they still live."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def role(process: psutil.Process) -> str:
    """What a process of `dat serve` is: service, replica, proxy, haproxy, raylet, ..., ray (else); "" if gone.

    Ray writes an actor's class into its process's title, as in `ray::ServeReplica:tiny-f8:codec`.
    """
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        name: str = process.name()
        command: list[str] = process.cmdline()
    except psutil.Error:
        return ""
    title = command[0] if command else name
    for mark, found in (
        ("ServeReplica", "replica"), ("ProxyActor", "proxy"), ("HAProxyManager", "proxy"),
        ("ServeController", "controller"),
    ):  # fmt: skip
        if title.startswith("ray::") and mark in title:
            return found
    if name in ("haproxy", "raylet", "gcs_server"):
        return name
    return "service" if "dat_service.cli" in command else "ray"


def in_role(pid: int, wanted: str) -> list[psutil.Process]:
    """Those of a service's processes that have this role."""
    return [process for process in family(pid) if role(process) == wanted]


@dataclass(frozen=True)
class Sample:
    """What one process holds: resident bytes and open file descriptors."""

    role: str
    rss: int
    fds: int


def samples(pid: int) -> dict[int, Sample]:
    """By process id, of the process and all that it began."""
    found = {}
    for process in family(pid):
        part = role(process)
        if not part:
            continue
        with contextlib.suppress(psutil.Error):
            found[process.pid] = Sample(part, process.memory_info().rss, process.num_fds())
    return found


class CpuShare:
    """How full the machine's cores are while the block runs, 0..1 in `share`."""

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


def wait_until(true: Callable[[], bool], within_s: float, what: str) -> None:
    """Polls `true()`; raises TimeoutError with `what` when it stays false."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)
