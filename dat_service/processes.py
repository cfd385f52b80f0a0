"""Finds and ends processes that this one started, also those whose parents have ended already."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

import psutil


def runs(process: psutil.Process) -> bool:
    """Whether the process still exists (its id may belong to another one by now) and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Returns the roots and all their descendants, as far as they still run."""
    found: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {root, *root.children(recursive=True)}
    return set(filter(runs, found))


def mentioning(text: str) -> set[psutil.Process]:
    """Returns the processes whose command line contains `text`, except this process.

    This finds orphans too: their parent is the machine's first process, so `descendants` misses them.
    """
    found = set()
    for pid in set(psutil.pids()) - {os.getpid()}:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if any(text in argument for argument in process.cmdline()):
                found.add(process)
    return found


def end(processes: set[psutil.Process], patience_s: float) -> set[psutil.Process]:
    """Waits `patience_s` for the processes to end, then sends SIGTERM, and SIGKILL after 2 s more.

    Returns the processes that had to be sent a signal.
    """
    late = _wait(processes, patience_s)
    for process in late:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in _wait(late, 2):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait(late, 5)
    return late


def _wait(processes: set[psutil.Process], patience_s: float) -> set[psutil.Process]:
    """Returns the processes that still run after `patience_s`.

    `psutil.wait_procs` does not fit: it takes the exit status of Ray's own children from Ray, and where the kernel
    lacks pidfd_open it waits for zombies that nobody reaps.
    """
    deadline = time.monotonic() + patience_s
    while (left := set(filter(runs, processes))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
