"""10,000 mutated infer requests, a good one compared every 50: no 5xx, no crash, no growth.

    python -m tests.fuzz.fuzz             # DAT_FUZZ_N=10000 requests, on Ray Serve and with --local

A 503 that says when to come again is an answer, and a 504 to a request that set a deadline. What is no HTTP may be
answered by closing the connection.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.processes import ResourceUsage, dat_serve, resource_usage
from dat_service.launch import RunningProcess
from tests.fuzz.requests import CODEC, Message, good_requests, mutated
from tests.load.traffic import show

NUMBER = int(os.environ.get("DAT_FUZZ_N", "10000"))
GOOD_EVERY = 50
OWED_S = 60.0  # a whole request is answered within this
NOT_OWED_S = 0.05  # how long an answer to what is not whole is looked for
MAX_GROWTH, MAX_MORE_FILES = 1.03, 3  # of each process, since a fifth of the requests
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


@dataclass
class Fuzzed:
    """What came back: statuses (0: closed without an answer) by kind of mutation, and what must not be."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fuzz(url: str, number: int, *, first: int = 0, each: Callable[[int], None] = lambda i: None) -> Fuzzed:
    """Sends requests `first` to `first + number`; `each` is called after every one."""
    good = good_requests()
    right = [send(url, message) for message in good]
    fuzzed = Fuzzed()
    for reply, message in zip(right, good, strict=True):
        if status_of(reply) != 200:
            fuzzed.faults.append(f"good request {message.header[:200]!r}: {reply[:300]!r}")
    for i in range(first, first + number):
        message = mutated(i, good)
        try:
            reply = send(url, message)
        except TimeoutError:
            fuzzed.faults.append(f"seed {i} ({message.kind}): no answer within {OWED_S:g} s")
            continue
        status = status_of(reply)
        fuzzed.statuses[message.kind, status] += 1
        wrong = fault(message, status, reply)
        if wrong:
            fuzzed.faults.append(f"seed {i} ({message.kind}): {wrong}")
        if i % GOOD_EVERY == 0:
            at = i // GOOD_EVERY % len(good)
            if body_of(send(url, good[at])) != body_of(right[at]):
                fuzzed.faults.append(f"good request {at} after seed {i} is answered otherwise than at first")
        each(i)
    return fuzzed


def fault(message: Message, status: int, reply: bytes) -> str:
    """What is wrong with an answer; nothing mostly."""
    if status == 0 and message.whole:
        return "closed without an answer"
    deadline = b"x-dat-timeout-ms" in message.to_bytes().lower()
    if (
        status >= 500
        and not (status == 503 and b"retry-after:" in reply.lower())
        and not (status == 504 and deadline)
    ):
        return f"{reply[:400]!r}"
    return ""


def send(url: str, message: Message) -> bytes:
    """The bytes that come back for it on a connection of its own. Raises TimeoutError where an answer is owed."""
    parts = urlsplit(url)
    data, reply = message.to_bytes(), b""
    with socket.create_connection((parts.hostname, parts.port), timeout=OWED_S) as s:
        with contextlib.suppress(OSError):  # refused before all was sent; the answer may be there
            s.sendall(data)
        s.settimeout(OWED_S if message.whole else NOT_OWED_S)
        deadline = time.monotonic() + OWED_S
        try:
            while not is_whole(reply, head=message.line.startswith("HEAD")) and time.monotonic() < deadline:
                more = s.recv(1 << 16)
                if not more:
                    break
                reply += more
        except TimeoutError:
            if message.whole:
                raise
        except OSError:
            pass
    return reply


def is_whole(reply: bytes, *, head: bool) -> bool:
    """Whether the first answer in these bytes is there to its end."""
    fields, end, body = reply.partition(b"\r\n\r\n")
    if not end:
        return False
    length = re.search(rb"\r\ncontent-length: *(\d+)", fields, re.IGNORECASE)
    return head or length is None or len(body) >= int(length[1])


def status_of(reply: bytes) -> int:
    """The first answer's status; 0 where there is none."""
    found = STATUS.match(reply)
    return int(found[1]) if found else 0


def body_of(reply: bytes) -> bytes:
    return reply.partition(b"\r\n\r\n")[2]


def fuzz_service(number: int, *arguments: str) -> dict[str, Any]:
    """A `dat serve` under fuzzing: statuses, faults, and processes that grew, ended or are new."""
    with dat_serve("--codec", CODEC, "--threads", "1", *arguments) as service:
        early: dict[int, ResourceUsage] = {}

        def look(i: int) -> None:
            if i == number // 5:
                early.update(resource_usage(service.pid))
            if i and i % 1000 == 0:
                print(f"  {i} of {number}", flush=True)

        began = time.monotonic()
        fuzzed = fuzz(service.url, number, each=look)
        took_s = time.monotonic() - began
        changed = compare(service, early)
    by_status: Counter[int] = Counter()
    for (_, status), count in fuzzed.statuses.items():
        by_status[status] += count
    return {
        "requests": number,
        "seconds": took_s,
        "statuses": dict(sorted(by_status.items())),
        "by kind": {
            kind: {s: n for (k, s), n in sorted(fuzzed.statuses.items()) if k == kind}
            for kind in sorted({kind for kind, _ in fuzzed.statuses})
        },
        "processes that grew or ended": changed,
        "errors": fuzzed.faults,
    }


def compare(service: RunningProcess, early: dict[int, ResourceUsage]) -> list[str]:
    """Lists the processes that grew beyond the limits, and those of the service that have ended."""
    late, changes = resource_usage(service.pid), []
    for pid, before in early.items():
        after = late.get(pid)
        if after is None:
            if before.role in ("replica", "service", "haproxy", "proxy"):
                changes.append(f"{before.role} {pid} ended")
        elif (
            after.resident_bytes > MAX_GROWTH * before.resident_bytes
            or after.open_files > before.open_files + MAX_MORE_FILES
        ):
            memory = f"{before.resident_bytes / 1e6:.1f} to {after.resident_bytes / 1e6:.1f} MB"
            changes.append(f"{before.role} {pid}: {memory}, {before.open_files} to {after.open_files} files")
    return changes


if __name__ == "__main__":
    show("dat serve --local", fuzz_service(NUMBER, "--local"))
    show("dat serve", fuzz_service(NUMBER))
