"""Sends 10,000 mutated infer requests, and compares a good one every 50: no 5xx, no crash, no growth.

    python -m tests.fuzz.fuzz             # DAT_FUZZ_N=10000 requests, on Ray Serve and with --local

A 503 with a Retry-After is a fine answer, and so is a 504 to a request that set a deadline. Bytes that are not HTTP
may be answered by closing the connection.
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
ANSWER_TIMEOUT_S = 60.0  # a whole request must be answered within this time
BROKEN_TIMEOUT_S = 0.05  # how long to wait for an answer to an incomplete request
MAX_GROWTH, MAX_MORE_FILES = 1.03, 3  # of each process, since a fifth of the requests
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


@dataclass
class Fuzzed:
    """The statuses by kind of mutation (0: closed without an answer), and the faults."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fuzz(url: str, number: int, *, first: int = 0, each: Callable[[int], None] = lambda i: None) -> Fuzzed:
    """Sends requests `first` to `first + number` and calls `each` after every one."""
    good = good_requests()
    expected = [send(url, message) for message in good]
    fuzzed = Fuzzed()
    for reply, message in zip(expected, good, strict=True):
        if status_of(reply) != 200:
            fuzzed.faults.append(f"good request {message.header[:200]!r}: {reply[:300]!r}")
    for i in range(first, first + number):
        message = mutated(i, good)
        try:
            reply = send(url, message)
        except TimeoutError:
            fuzzed.faults.append(f"seed {i} ({message.kind}): no answer within {ANSWER_TIMEOUT_S:g} s")
            continue
        status = status_of(reply)
        fuzzed.statuses[message.kind, status] += 1
        wrong = fault(message, status, reply)
        if wrong:
            fuzzed.faults.append(f"seed {i} ({message.kind}): {wrong}")
        if i % GOOD_EVERY == 0:
            at = i // GOOD_EVERY % len(good)
            if body_of(send(url, good[at])) != body_of(expected[at]):
                fuzzed.faults.append(f"good request {at} after seed {i} is answered differently than at first")
        each(i)
    return fuzzed


def fault(message: Message, status: int, reply: bytes) -> str:
    """Returns a description of what is wrong with an answer, or an empty text."""
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
    """Sends it on a new connection and returns the reply. Raises TimeoutError if a whole request gets no answer."""
    parts = urlsplit(url)
    data, reply = message.to_bytes(), b""
    with socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_TIMEOUT_S) as s:
        with contextlib.suppress(OSError):  # refused before all was sent; the answer may have arrived
            s.sendall(data)
        s.settimeout(ANSWER_TIMEOUT_S if message.whole else BROKEN_TIMEOUT_S)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
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
    """Returns whether these bytes hold a complete answer."""
    fields, end, body = reply.partition(b"\r\n\r\n")
    if not end:
        return False
    length = re.search(rb"\r\ncontent-length: *(\d+)", fields, re.IGNORECASE)
    return head or length is None or len(body) >= int(length[1])


def status_of(reply: bytes) -> int:
    """Returns the status of the answer; 0 if there is none."""
    found = STATUS.match(reply)
    return int(found[1]) if found else 0


def body_of(reply: bytes) -> bytes:
    """Returns the body of the answer."""
    return reply.partition(b"\r\n\r\n")[2]


def fuzz_service(number: int, *arguments: str) -> dict[str, Any]:
    """Fuzzes a `dat serve`; returns statuses, faults, and the processes that grew or ended."""
    with dat_serve("--codec", CODEC, "--threads", "1", *arguments) as service:
        early: dict[int, ResourceUsage] = {}

        def sample(i: int) -> None:
            if i == number // 5:
                early.update(resource_usage(service.pid))
            if i and i % 1000 == 0:
                print(f"  {i} of {number}", flush=True)

        began = time.monotonic()
        fuzzed = fuzz(service.url, number, each=sample)
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
