"""Parts `codec` and `small`: images/s of `dat serve` for several clients, beside the engine without a service.

The two take turns, never both at a time: on 2 cores each wants all of them. The clients are threads of this one
process, which is what costs the cores least: they wait most of the time, and a process each would hold memory and
caches for nothing. The engine runs in a process of its own, twice: as it comes, and with OMP_WAIT_POLICY=PASSIVE,
under which its threads sleep between two calls instead of spinning.
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

from benchmarks.pictures import pictures
from benchmarks.processes import clean_environment, dat_serve
from dat_client import Client
from dat_service.launch import READY, StartFailed
from dat_workers.system.timing import Timing, ratio

MIXED = (1, 7, 16, 40)
SMALL = (1,) * 16
ENGINE, PASSIVE = "engine, in-process", "engine, in-process, OMP_WAIT_POLICY=PASSIVE"
SERVICE = "dat serve"
BARS = {"codec": 0.95, "small": 0.8}  # of the engine's images/s
SIZES = {"codec": MIXED, "small": SMALL}
Array = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Done:
    """One answered call: when it began and ended (time.perf_counter), and its images."""

    began: float
    ended: float
    images: int

    def within(self, first: float, last: float) -> float:
        """Its images, as if they were made evenly over the call: the share of them that falls between the two."""
        overlap = min(self.ended, last) - max(self.began, first)
        return self.images * max(0.0, overlap) / (self.ended - self.began)


def closed_loop(
    url: str, codec: str, batches: Sequence[Array], seconds: float, settle_s: float = 1.0
) -> tuple[float, list[Done]]:
    """Images/s of clients that each send a batch of their own again and again, and the calls.

    Counts what falls into `seconds` after `settle_s`. Every client goes on until each has had an answer after the
    end: the last calls meet the same load as the others. Raises what a call raised.
    """
    done: list[list[Done]] = [[] for _ in batches]
    errors: list[Exception] = []
    first = time.perf_counter() + settle_s
    last = first + seconds

    def go_on() -> bool:
        return not errors and not all(calls and calls[-1].ended > last for calls in done)

    def work(calls: list[Done], batch: Array) -> None:
        try:
            with Client(url, codec, timeout_s=600, max_connections=1) as client:
                while go_on():
                    began = time.perf_counter()
                    client.discretize(batch)
                    calls.append(Done(began, time.perf_counter(), len(batch)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(done, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    calls = [call for one in done for call in one]
    return sum(call.within(first, last) for call in calls) / seconds, calls


@contextlib.contextmanager
def engine(codec: str, side: int, **env: str) -> Iterator[Callable[[float], tuple[float, int]]]:
    """A function that says the engine's images/s over so many seconds, and its best batch."""
    command = [sys.executable, "-m", "benchmarks.service.engine_process", codec, str(side)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment(env)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(seconds: float) -> tuple[float, int]:
        print(seconds, file=stdin, flush=True)
        rate, batch = stdout.readline().split()
        return float(rate), int(batch)

    with process:
        try:
            if not stdout.readline().startswith(READY):
                raise StartFailed(" ".join(command))
            yield ask
        finally:
            stdin.close()  # it ends with its input


def run(
    parts: Sequence[str],
    rounds: int,
    say: Callable[[str], None],
    *,
    codec: str = "tiny-f8",
    side: int = 224,
    seconds: float = 20.0,
) -> list[dict[str, Any]]:
    """A result for each of the parts "codec" and "small", measured in turn with the engine in every round."""
    speeds: dict[str, list[float]] = {name: [] for name in (ENGINE, PASSIVE, *parts)}
    best: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        say("codec: starting the engine, looking for its best batch")
        engines = {ENGINE: stack.enter_context(engine(codec, side))}
        engines[PASSIVE] = stack.enter_context(engine(codec, side, OMP_WAIT_POLICY="PASSIVE"))
        say("codec: starting dat serve")
        url = stack.enter_context(dat_serve("--codec", codec)).url
        batches = {part: [pictures(size, side) for size in SIZES[part]] for part in parts}
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
            said = ", ".join(f"{name} {speeds[name][-1]:.4g}" for name in speeds)
            say(f"codec: round {i + 1} of {rounds}, images/s: {said}")
    timings = {name: Timing(tuple(1 / s for s in each), 1) for name, each in speeds.items()}
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
