"""Half an hour of all kinds of requests at once, while the memory and files of every process are watched.

    python -m tests.load.soak             # DAT_SOAK_S=1800 seconds

There are several sizes and dtypes, gradients, encoded pictures, tokens, requests that are refused, connections that
end within a body or before the answer, and calls that are cancelled or time out. All answers are compared. Resident
memory and open files of every process, this one included, are sampled; the medians after the warm-up and at the end
are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.processes import ResourceUsage, dat_serve, resource_usage
from benchmarks.tables import aligned
from dat_client import AsyncClient, Client, InvalidRequest, Unavailable, UnknownCodec, wire
from tests.load.answers import CODEC, KINDS, SERVE, Answers, compute_answers
from tests.load.traffic import Traffic, show

SECONDS = float(os.environ.get("DAT_SOAK_S", "1800"))
WARM_UP = 0.25  # of the time
WINDOW = 0.15  # of the time: medians of two such stretches are compared
MAX_GROWTH = 1.02
# Each thread of HAProxy keeps the memory that it frees, so it fills up slowly: with connections alone it grew from
# 13.5 to 14.3 MB over 160,000 of them, and stayed there to 235,000. In half an hour it keeps to this limit, but not
# to 2 %.
ROOM = {"haproxy": 4e6}
MAX_MORE_FILES = 2  # a connection more or less at the moment of a sample
SETTLED_S = 600.0  # in less time allocators are still growing, and growth is not judged
REPLICAS = 2
CLIENTS = 3


@dataclass
class History:
    """The samples of one process: seconds since the start, resident bytes, open files."""

    role: str
    at: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def add(self, at: float, usage: ResourceUsage) -> None:
        self.at.append(at)
        self.rss.append(usage.resident_bytes)
        self.fds.append(usage.open_files)

    def between(self, first: float, last: float) -> tuple[float, float] | None:
        """Returns the medians of bytes and files between two times; None if the process did not run then."""
        chosen = [i for i, at in enumerate(self.at) if first <= at <= last]
        if not chosen:
            return None
        return statistics.median(self.rss[i] for i in chosen), statistics.median(self.fds[i] for i in chosen)


def soak(seconds: float = SECONDS) -> dict[str, Any]:
    """Returns the figures; `grown` lists the processes beyond the limits if the run was long enough to judge."""
    answers = compute_answers(side=32)
    odd_answers = compute_answers(number=24, side=52)  # a size that f = 8 does not divide
    troubles = [refused, broken_off, cancelled, timed_out]
    errors: list[str] = []
    counts: dict[str, int] = {}
    histories: dict[int, History] = {}
    with dat_serve(*SERVE, "--replicas", str(REPLICAS)) as service:
        end = threading.Event()
        threads = [
            threading.Thread(target=repeat_trouble, args=(trouble, service.url, answers, end, errors, counts))
            for trouble in troubles
        ]
        for thread in threads:
            thread.start()
        with (
            Traffic([service.url] * CLIENTS, answers, kinds=KINDS) as traffic,
            Traffic([service.url], odd_answers, kinds=KINDS, most=4) as odd_traffic,
        ):
            watch(service.pid, seconds, histories)
            end.set()
        for thread in threads:
            thread.join()
    first = (WARM_UP * seconds, (WARM_UP + WINDOW) * seconds)
    rows = compare(histories, first, ((1 - WINDOW) * seconds, seconds + 60))
    figures = traffic.figures()
    return {
        "seconds": seconds,
        "calls": figures["calls"] + odd_traffic.figures()["calls"],
        "images": figures["images"] + odd_traffic.figures()["images"],
        "repeated by the client": figures["repeated by the client"],
        **{f"{name}, times": number for name, number in counts.items()},
        "table": rows,
        "grown": [row for row in rows if row["grown"]] if seconds >= SETTLED_S else [],
        "errors": figures["errors"] + odd_traffic.figures()["errors"] + errors,
    }


def watch(pid: int, seconds: float, histories: dict[int, History]) -> None:
    """Samples the processes of the service and this one for so many seconds."""
    began = time.monotonic()
    while (at := time.monotonic() - began) < seconds:
        client = os.getpid()
        for process, usage in (resource_usage(pid) | {client: resource_usage(client)[client]}).items():
            role = "client" if process == client else usage.role
            history = histories.setdefault(process, History(role))
            history.role = role  # a process may become another program: dat-haproxy is Python at first
            history.add(at, usage)
        time.sleep(max(1.0, seconds / 360))


def compare(
    histories: dict[int, History], first: tuple[float, float], last: tuple[float, float]
) -> list[dict[str, Any]]:
    """Returns a row for each process that ran in both windows."""
    rows = []
    for pid, process in sorted(histories.items(), key=lambda item: (item[1].role, item[0])):
        before, after = process.between(*first), process.between(*last)
        if before and after:
            room = ROOM.get(process.role, (MAX_GROWTH - 1) * before[0])
            grown = after[0] > before[0] + room or after[1] > before[1] + MAX_MORE_FILES
            rows.append({
                "role": process.role, "pid": pid, "rss_mb": before[0] / 1e6, "rss_end_mb": after[0] / 1e6,
                "growth": after[0] / before[0] - 1, "fds": before[1], "fds_end": after[1], "grown": grown,
            })  # fmt: skip
    return rows


Trouble = Callable[[str, Answers, int], None]


def repeat_trouble(
    trouble: Trouble, url: str, answers: Answers, end: threading.Event, errors: list[str], counts: dict[str, int]
) -> None:
    """Makes one kind of trouble a few times a second, and records where the service reacts in a wrong way."""
    number = 0
    while not end.wait(0.3):
        try:
            trouble(url, answers, number)
        except Exception as error:
            errors.append(f"{trouble.__name__}: {type(error).__name__}: {error}")
        number += 1
    counts[trouble.__name__] = number


def refused(url: str, answers: Answers, number: int) -> None:
    """Sends a wrong request: NaN, an unknown codec, an output that is not available, no picture, no token."""
    images = answers.images[:2]
    with Client(url, CODEC) as client, Client(url, "no-such-codec") as other_codec:
        wrong_calls: list[Callable[[], object]] = [
            lambda: client.discretize(np.full((1, 3, 32, 32), np.nan, np.float32)),
            lambda: other_codec.discretize(images),
            lambda: client.discretize(images, outputs=["adversarial"]),
            lambda: client.discretize([answers.png[0], b"no picture"]),
            lambda: client.decode(np.full((1, 4, 4), 20_000, np.int32)),
        ]
        try:
            wrong_calls[number % len(wrong_calls)]()
        except (InvalidRequest, UnknownCodec):
            return
    raise AssertionError(f"wrong request {number % len(wrong_calls)} was answered")


def broken_off(url: str, answers: Answers, number: int) -> None:
    """Closes a connection within the body, or after it and before the answer."""
    parts = urlsplit(url)
    chunks, length = wire.encode_request({"images": answers.images[:16]})
    body = b"".join(chunks)
    head = (
        f"POST /v2/models/{CODEC}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"{wire.HEADER_LENGTH}: {length}\r\n\r\n"
    ).encode()
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as s:
        s.sendall(head + (body if number % 2 else body[: len(body) // 2]))
        time.sleep(random.uniform(0, 0.05))


def cancelled(url: str, answers: Answers, number: int) -> None:
    """Cancels a call at a random moment; the next call of the same client must be right."""

    async def both() -> None:
        async with AsyncClient(url, CODEC) as client:
            task = asyncio.create_task(client.discretize(answers.images[:12]))
            await asyncio.sleep(random.uniform(0, 0.1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            q = await client.discretize(answers.images[:2], outputs=["reconstruction"])
            if not np.array_equal(q.reconstruction, answers.reconstruction[:2]):
                raise AssertionError("wrong answer after a cancelled call")

    asyncio.run(both())


def timed_out(url: str, answers: Answers, number: int) -> None:
    """Makes a call that mostly has less time than it takes."""
    with Client(url, CODEC) as client, contextlib.suppress(Unavailable):
        client.discretize(answers.images[:16], timeout_s=random.uniform(0.01, 0.2))


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a table with a line for each process."""
    heading = ["process", "pid", "RSS after warm-up", "at the end", "growth", "files", "at the end"]
    lines = [
        [
            row["role"], str(row["pid"]), f"{row['rss_mb']:.1f} MB", f"{row['rss_end_mb']:.1f} MB",
            f"{row['growth']:+.2%}", f"{row['fds']:.0f}", f"{row['fds_end']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return aligned([heading, *lines])


def show_soak(figures: dict[str, Any]) -> None:
    show("soak", {name: value for name, value in figures.items() if name != "table"})
    print(table(figures["table"]), flush=True)
    if figures["seconds"] < SETTLED_S:
        print(f"shorter than {SETTLED_S:g} s: growth is shown and not judged", flush=True)


if __name__ == "__main__":
    show_soak(soak())
