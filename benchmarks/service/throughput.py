"""Parts `codec` and `small`: images/s of `dat serve` for several clients, beside the engine without a service.

The two take turns and never run at the same time, since each wants all cores. The clients are threads of this one
process, which costs the cores least: they wait most of the time, and processes would hold memory and caches for
nothing. The engine runs in two processes of its own: by default, and with OMP_WAIT_POLICY=PASSIVE, under which its
threads sleep between two calls instead of spinning.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.pictures import shifted_photographs
from benchmarks.processes import clean_environment, dat_serve
from dat_client import Client
from dat_service.bench.timing import Timing, ratio
from dat_service.launch import READY, StartFailed

MIXED = (1, 7, 16, 40)
SMALL = (1,) * 16
ENGINE, PASSIVE = "engine, in-process", "engine, in-process, OMP_WAIT_POLICY=PASSIVE"
SERVICE = "dat serve"
TARGETS = {"codec": 0.95, "small": 0.8}  # least share of the engine's images/s
SIZES = {"codec": MIXED, "small": SMALL}
Array = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Call:
    """One answered call: when it began and ended (time.perf_counter), and its images."""

    began: float
    ended: float
    images: int

    def images_between(self, first: float, last: float) -> float:
        """Returns the share of its images that falls between two times, as if all took equally long."""
        overlap = min(self.ended, last) - max(self.began, first)
        return self.images * max(0.0, overlap) / (self.ended - self.began)


def closed_loop(
    url: str, codec: str, batches: Sequence[Array], seconds: float, settle_s: float = 1.0
) -> tuple[float, list[Call]]:
    """Returns the images/s of clients that each send a batch of their own again and again, and the calls.

    It counts what falls into `seconds` after `settle_s`. Every client goes on until each has had an answer after
    the end, so that the last calls meet the same load as the others. Raises the first error of a call.
    """
    calls_of_clients: list[list[Call]] = [[] for _ in batches]
    errors: list[Exception] = []
    first = time.perf_counter() + settle_s
    last = first + seconds

    def goes_on() -> bool:
        return not errors and not all(calls and calls[-1].ended > last for calls in calls_of_clients)

    def work(calls: list[Call], batch: Array) -> None:
        try:
            with Client(url, codec, timeout_s=600, max_connections=1) as client:
                while goes_on():
                    began = time.perf_counter()
                    client.discretize(batch)
                    calls.append(Call(began, time.perf_counter(), len(batch)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls_of_clients, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    all_calls = [call for calls in calls_of_clients for call in calls]
    return sum(call.images_between(first, last) for call in all_calls) / seconds, all_calls


@contextlib.contextmanager
def engine(codec: str, side: int, **env: str) -> Iterator[Callable[[float], tuple[float, int]]]:
    """Yields a function that runs the engine for so many seconds and returns its images/s and best batch."""
    command = [sys.executable, "-m", "benchmarks.service.engine_process", codec, str(side)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment(env)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def measure(seconds: float) -> tuple[float, int]:
        print(seconds, file=stdin, flush=True)
        rate, batch = stdout.readline().split()
        return float(rate), int(batch)

    with process:
        try:
            if not stdout.readline().startswith(READY):
                raise StartFailed(" ".join(command))
            yield measure
        finally:
            stdin.close()  # it ends with its input


def run(
    parts: Sequence[str],
    rounds: int,
    report: Callable[[str], None],
    *,
    codec: str = "tiny-f8",
    side: int = 224,
    seconds: float = 20.0,
) -> list[dict[str, Any]]:
    """Returns a result for each of the parts "codec" and "small"; they and the engine take turns in every round."""
    speeds: dict[str, list[float]] = {name: [] for name in (ENGINE, PASSIVE, *parts)}
    best: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        report("codec: starting the engine and looking for its best batch")
        engines = {ENGINE: stack.enter_context(engine(codec, side))}
        engines[PASSIVE] = stack.enter_context(engine(codec, side, OMP_WAIT_POLICY="PASSIVE"))
        report("codec: starting dat serve")
        url = stack.enter_context(dat_serve("--codec", codec)).url
        batches = {part: [shifted_photographs(size, side) for size in SIZES[part]] for part in parts}
        for part in parts:
            closed_loop(url, codec, batches[part], 0.1)
        for i in range(rounds):
            names = list(speeds) if i % 2 == 0 else list(reversed(speeds))
            for name in names:
                if name in engines:
                    speed, best[name] = engines[name](seconds)
                else:
                    speed, _ = closed_loop(url, codec, batches[name], seconds)
                speeds[name].append(speed)
            latest = ", ".join(f"{name} {speeds[name][-1]:.4g}" for name in speeds)
            report(f"codec: round {i + 1} of {rounds}, images/s: {latest}")
    timings = {name: Timing(tuple(1 / speed for speed in each), 1) for name, each in speeds.items()}
    return [
        {
            "part": part,
            "codec": codec,
            "side": side,
            "seconds_a_round": seconds,
            "clients": list(SIZES[part]),
            "images_per_s": list(speeds[part]),
            "engines": [
                {"contestant": name, "best_batch": best[name], "images_per_s": list(speeds[name]),
                 "ours_times": vars(ratio(timings[part], timings[name]))}
                for name in engines
            ],
        }
        for part in parts
    ]  # fmt: skip
