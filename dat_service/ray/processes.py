"""Processes that this one began: found and ended by their id, and by when they began, for ids are used again."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    pid: int
    started: int  # clock ticks since the machine's start

    def runs(self) -> bool:
        """Whether it is there and no zombie."""
        found = _stat(self.pid)
        return found is not None and found[1:] == (self.started, True)


def _stat(pid: int) -> tuple[int, int, bool] | None:
    """Parent, start and whether it is more than a zombie; none where there is no such process."""
    try:
        # bytes: a process's name, in the brackets, may be any
        fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19]), fields[0] not in (b"Z", b"X")


def children(pid: int) -> set[Process]:
    """Processes begun by `pid` itself."""
    return {Process(child, started) for child, (parent, started, _) in _all().items() if parent == pid}


def descendants(roots: set[Process]) -> set[Process]:
    """The roots, what they began, what that began, ... as far as it all still runs."""
    found = {p for p in roots if p.runs()}
    stats = _all()
    wave = {p.pid for p in found}
    while wave:
        wave = {pid for pid, (parent, _, _) in stats.items() if parent in wave} - {p.pid for p in found}
        found |= {Process(pid, stats[pid][1]) for pid in wave}
    return found


def mentioning(text: str) -> set[Process]:
    """Processes whose command line mentions a text, this one left out.

    An orphan belongs to the machine's first process: by its parents it cannot be found any more.
    """
    found = set()
    for pid, (_, started, _) in _all().items():
        try:
            if pid != os.getpid() and text.encode() in (PROC / str(pid) / "cmdline").read_bytes():
                found.add(Process(pid, started))
        except OSError:
            continue
    return found


def _all() -> dict[int, tuple[int, int, bool]]:
    return {int(e.name): s for e in PROC.iterdir() if e.name.isdigit() and (s := _stat(int(e.name))) is not None}


def end(processes: set[Process], patience_s: float) -> set[Process]:
    """Waits until they have ended; those that have not are told to, then made to. Returns these."""
    late = _wait(processes, patience_s)
    for process in late:
        _send(process, signal.SIGTERM)
    for process in _wait(late, 2):
        _send(process, signal.SIGKILL)
    _wait(late, 5)
    return late


def _wait(processes: set[Process], patience_s: float) -> set[Process]:
    deadline = time.monotonic() + patience_s
    while (left := {p for p in processes if p.runs()}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _send(process: Process, number: signal.Signals) -> None:
    try:
        if process.runs():
            os.kill(process.pid, number)
    except ProcessLookupError:
        pass
