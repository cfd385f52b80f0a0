"""Kills a replica every 5 s, and HAProxy and Serve's proxy once each, under 8 clients that compare every answer.

python -m tests.load.chaos            # DAT_CHAOS_S=120 seconds
"""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

from benchmarks.processes import dat_serve, in_role, wait_until
from dat_service.launch import RunningProcess
from tests.load.answers import SERVE, compute_answers
from tests.load.traffic import Traffic, show

SECONDS = float(os.environ.get("DAT_CHAOS_S", "120"))
EVERY_S = 5.0
CLIENTS = 8
REPLICAS = 4  # one starts in about 10 s, so that two or three of them answer at any time


def chaos(seconds: float = SECONDS) -> dict[str, Any]:
    """Returns the figures; errors of the clients are among them and not raised."""
    answers = compute_answers()
    with dat_serve(*SERVE, "--replicas", str(REPLICAS)) as service:
        with Traffic([service.url] * CLIENTS, answers) as traffic:
            killed = kill(service, seconds)
        wait_for_all(service)  # replicas that were killed have been replaced
        figures = traffic.figures()
    return {"seconds": seconds, **killed, **figures}


def kill(service: RunningProcess, seconds: float) -> dict[str, int]:
    """Kills for so many seconds; returns how many processes of each role were killed."""
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
    """Kills the oldest process of that role, which surely serves; returns False if there is none at the moment."""
    try:
        oldest = min(in_role(service.pid, role), key=lambda process: process.create_time(), default=None)
        if oldest is not None:
            oldest.kill()
            return True
    except psutil.NoSuchProcess:
        pass
    return False


def serving(service: RunningProcess) -> list[psutil.Process]:
    """Returns the replicas that have loaded their codec, as the titles of their processes show."""
    return [process for process in in_role(service.pid, "replica") if "initialize" not in title(process)]


def title(process: psutil.Process) -> str:
    """Returns the title of the process, and "initialize" if the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "initialize"


def wait_for_all(service: RunningProcess, timeout_s: float = 300) -> None:
    """Returns as soon as all replicas serve again."""
    wait_until(lambda: len(serving(service)) >= REPLICAS, timeout_s, f"{REPLICAS} replicas serve again")


if __name__ == "__main__":
    show("chaos", chaos())
