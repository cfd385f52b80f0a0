"""A replica killed every 5 s, HAProxy and Serve's proxy once each, under 8 clients who compare every answer.

python -m tests.load.chaos            # DAT_CHAOS_S=120 seconds
"""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

from benchmarks.processes import dat_serve, in_role, wait_until
from dat_service.launch import RunningProcess
from tests.load.answers import SERVE, answers
from tests.load.traffic import Traffic, show

SECONDS = float(os.environ.get("DAT_CHAOS_S", "120"))
EVERY_S = 5.0
CLIENTS = 8
REPLICAS = 4  # one starts in some 10 s here, so that two or three of them answer at any time


def chaos(seconds: float = SECONDS) -> dict[str, Any]:
    """The figures; raises nothing for what the clients have seen."""
    right = answers()
    with dat_serve(*SERVE, "--replicas", str(REPLICAS)) as service:
        with Traffic([service.url] * CLIENTS, right) as traffic:
            killed = kill(service, seconds)
        wait_for_all(service)  # whatever was killed has come back
        figures = traffic.figures()
    return {"seconds": seconds, **killed, **figures}


def kill(service: RunningProcess, seconds: float) -> dict[str, int]:
    """Kills for so long; how many of which role were."""
    killed = {"replica": 0, "put off": 0, "haproxy": 0, "proxy": 0}
    began = time.monotonic()
    once = {"haproxy": began + seconds / 3, "proxy": began + 2 * seconds / 3}
    due = began + EVERY_S
    while time.monotonic() < began + seconds:
        now = time.monotonic()
        if now >= due:
            done = len(serving(service)) > 1 and kill_one(service, "replica")
            killed["replica" if done else "put off"] += 1
            due += EVERY_S
        for role in [role for role, at in once.items() if now >= at]:
            if kill_one(service, role):
                killed[role] += 1
                del once[role]
        time.sleep(0.1)
    return killed


def kill_one(service: RunningProcess, role: str) -> bool:
    """SIGKILL to the oldest of that role, which surely serves; False where there is none at this moment."""
    try:
        oldest = min(in_role(service.pid, role), key=lambda process: process.create_time(), default=None)
        if oldest is not None:
            oldest.kill()
            return True
    except psutil.NoSuchProcess:
        pass
    return False


def serving(service: RunningProcess) -> list[psutil.Process]:
    """Replicas that have their codec; Ray shows in a process's title what its actor is doing."""
    return [process for process in in_role(service.pid, "replica") if "initialize" not in title(process)]


def title(process: psutil.Process) -> str:
    """The process's title; of one that has gone, that it initializes."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "initialize"


def wait_for_all(service: RunningProcess, within_s: float = 300) -> None:
    """Returns when as many replicas as asked for serve again."""
    wait_until(lambda: len(serving(service)) >= REPLICAS, within_s, f"{REPLICAS} replicas serve again")


if __name__ == "__main__":
    show("chaos", chaos())
