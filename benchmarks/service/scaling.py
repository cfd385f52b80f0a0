"""Part `scaling`: throughput of 1, 2, 4, 8 replicas whose codec is a stand-in that only sleeps (sleeping.py).

Replicas on GPUs of their own leave the cores to the service: what is looked for is where the cores, of which the
clients take their part here, become the limit. Where the most replicas do not fill them, the sleep is halved until
they are full: a core has no use for a number of replicas, only for requests a second.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.processes import CpuShare, clean_environment
from benchmarks.service.throughput import closed_loop
from benchmarks.stand_ins.sleeping import BATCH, name_of
from dat_client import Client
from dat_service.launch import running_process
from dat_service.ports import free_port

REPLICAS = (1, 2, 4, 8)
SLEEP_MS = 100.0
SIDE = 64
CLIENTS_A_REPLICA = 3  # one batch computed, one waiting, one on its way
BAR = 0.95  # of linear
FULL = 0.9  # share of the cores' time above which they count as full
SHORTEST_MS = 3.0


@contextlib.contextmanager
def sleepers(replicas: int, sleep_ms: float) -> Iterator[str]:
    """The address of the stand-in on Ray Serve, once every replica answers."""
    port = free_port()
    command = [
        sys.executable, "-m", "benchmarks.stand_ins.sleeping",
        "--replicas", str(replicas), "--sleep-ms", f"{sleep_ms:g}", "--port", str(port),
    ]  # fmt: skip
    with running_process(command, f"http://127.0.0.1:{port}", env=clean_environment()) as service:
        with Client(service.url, name_of(sleep_ms)) as client:
            client.wait_ready(120)
        yield service.url


def measure(url: str, replicas: int, sleep_ms: float, rounds: int, seconds: float) -> dict[str, Any]:
    """Images/s of every round, and how full the cores were meanwhile."""
    batches = [
        np.random.default_rng(i).integers(0, 256, (BATCH, 3, SIDE, SIDE), np.uint8)
        for i in range(CLIENTS_A_REPLICA * replicas)
    ]
    speeds, shares = [], []
    for _ in range(rounds):
        with CpuShare() as cpu:
            speed, _ = closed_loop(url, name_of(sleep_ms), batches, seconds)
        speeds.append(speed)
        shares.append(cpu.share)
    return {
        "replicas": replicas,
        "sleep_ms": sleep_ms,
        "clients": len(batches),
        "rounds": speeds,
        "images_per_s": statistics.median(speeds),
        "requests_per_s": statistics.median(speeds) / BATCH,
        "linear_images_per_s": replicas * BATCH / sleep_ms * 1000,
        "cpu_share": statistics.median(shares),
    }


def run(
    rounds: int,
    say: Callable[[str], None],
    *,
    replicas: Sequence[int] = REPLICAS,
    sleep_ms: float = SLEEP_MS,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """A row for each number of replicas, then shorter sleeps until the cores are full, and where that was."""
    rows: list[dict[str, Any]] = []
    base: float | None = None  # images/s of one replica, times its sleep in ms

    def row(number: int, ms: float) -> dict[str, Any]:
        nonlocal base
        say(f"scaling: starting {number} sleeping stand-ins of {ms:g} ms")
        with sleepers(number, ms) as url:
            measured = measure(url, number, ms, rounds, seconds)
        if base is None:
            base = measured["images_per_s"] * ms / number
        measured["of_linear"] = measured["images_per_s"] * ms / number / base
        say(
            f"scaling: {measured['images_per_s']:.4g} images/s, {measured['of_linear']:.1%} of linear, "
            f"cores {measured['cpu_share']:.0%} full"
        )
        rows.append(measured)
        return measured

    for number in replicas:
        last = row(number, sleep_ms)
    ms = sleep_ms
    while not is_full(last) and ms / 2 >= SHORTEST_MS:
        ms /= 2
        last = row(replicas[-1], ms)
    full = next((r for r in rows if is_full(r)), None)
    return {
        "part": "scaling",
        "batch": BATCH,
        "side": SIDE,
        "results": rows,
        "full_at": full,
    }


def is_full(row: dict[str, Any]) -> bool:
    """Whether the cores had no time left."""
    return bool(row["cpu_share"] >= FULL)
