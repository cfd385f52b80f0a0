"""Part `scaling`: throughput of 1, 2, 4, 8 replicas whose codec is the sleeping stand-in.

Replicas on GPUs of their own leave the cores to the service. The question is at which load the cores, which the
clients share here, become the limit. If the largest number of replicas does not fill them, the sleep is halved
until they are full: what fills a core is requests per second, not replicas.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.processes import CpuShare
from benchmarks.service.throughput import closed_loop
from benchmarks.stand_ins.sleeping import BATCH, name_of, sleeping_service

REPLICAS = (1, 2, 4, 8)
SLEEP_MS = 100.0  # for a request of BATCH images
SIDE = 64
CLIENTS_A_REPLICA = 3  # one batch computed, one waiting, one on its way
TARGET = 0.95  # least share of linear scaling
FULL = 0.9  # share of the cores' time above which they count as full
SHORTEST_MS = 3.0


def measure(url: str, replicas: int, sleep_ms: float, rounds: int, seconds: float) -> dict[str, Any]:
    """Returns the images/s of every round, and how full the cores were meanwhile."""
    batches = [
        np.random.default_rng(i).integers(0, 256, (BATCH, 3, SIDE, SIDE), np.uint8)
        for i in range(CLIENTS_A_REPLICA * replicas)
    ]
    speeds, shares = [], []
    for _ in range(rounds):
        with CpuShare() as cpu:
            speed, _ = closed_loop(url, name_of(sleep_ms / BATCH), batches, seconds)
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
    report: Callable[[str], None],
    *,
    replicas: Sequence[int] = REPLICAS,
    sleep_ms: float = SLEEP_MS,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Returns a row for each number of replicas, then for shorter sleeps until the cores are full."""
    rows: list[dict[str, Any]] = []
    base: float | None = None  # images/s of one replica, times its sleep in ms

    def add_row(number: int, ms: float) -> dict[str, Any]:
        nonlocal base
        report(f"scaling: starting {number} sleeping stand-ins of {ms:g} ms")
        with sleeping_service(ms / BATCH, replicas=number) as url:
            row = measure(url, number, ms, rounds, seconds)
        if base is None:
            base = row["images_per_s"] * ms / number
        row["of_linear"] = row["images_per_s"] * ms / number / base
        report(
            f"scaling: {row['images_per_s']:.4g} images/s, {row['of_linear']:.1%} of linear, "
            f"cores {row['cpu_share']:.0%} full"
        )
        rows.append(row)
        return row

    for number in replicas:
        last = add_row(number, sleep_ms)
    ms = sleep_ms
    while not is_full(last) and ms / 2 >= SHORTEST_MS:
        ms /= 2
        last = add_row(replicas[-1], ms)
    full = next((row for row in rows if is_full(row)), None)
    return {"part": "scaling", "batch": BATCH, "side": SIDE, "results": rows, "full_at": full}


def is_full(row: dict[str, Any]) -> bool:
    """Returns whether the cores had no time left."""
    return bool(row["cpu_share"] >= FULL)
