"""Finds and ends the processes that this process started, including those whose parents have already ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

import psutil


def runs(process: psutil.Process) -> bool:
    """Returns True if the process still exists and is not a zombie.

    Returns False if another process has taken over its id by now.
    """
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Returns those of the roots and of all their descendants that still run."""
    found: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {root, *root.children(recursive=True)}
    return set(filter(runs, found))


def mentioning(text: str) -> set[psutil.Process]:
    """Returns all processes but this one whose command line contains `text`.

    The result includes orphans, which `descendants` misses because their parent is the machine's first process.
    """
    found = set()
    for pid in set(psutil.pids()) - {os.getpid()}:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if any(text in argument for argument in process.cmdline()):
                found.add(process)
    return found


def end(processes: set[psutil.Process], patience_s: float) -> set[psutil.Process]:
    """Waits up to `patience_s` seconds for the processes to end, then ends those that still run.

    They get SIGTERM first, and SIGKILL if they still run 2 s later. Returns the processes that got a signal.
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
    """Waits up to `patience_s` seconds for the processes to end; returns those that still run.

    `psutil.wait_procs` is not used, for two reasons. It takes the exit status of Ray's own children, so Ray
    never gets it. Where the kernel lacks pidfd_open, it also waits for zombies that no process reaps.
    """
    deadline = time.monotonic() + patience_s
    while (left := set(filter(runs, processes))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
