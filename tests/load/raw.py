"""Clients without retries: each request has one status, so that refusals can be counted."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

import dat_client.wire as wire


@dataclass
class Replies:
    """The replies: seconds of the answered, statuses (0: no reply), seconds of the refused, and faults."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    refused_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class RawClient:
    """Keeps one connection, whose requests are a flow of their own in the queue."""

    def __init__(self, url: str, codec: str, images: np.ndarray, name: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        chunks, length = wire.encode_request({"images": images})
        self._body = b"".join(chunks)
        self._path = f"{parts.path}/v2/models/{codec}/infer"
        self._headers = {
            "Content-Type": "application/octet-stream", wire.HEADER_LENGTH: str(length), "X-Dat-Client": name,
        }  # fmt: skip

    def post(self) -> tuple[int, dict[str, str], bytes]:
        """Sends the request; returns status, headers with lower-case names, and body."""
        self._connection.request("POST", self._path, self._body, self._headers)
        response = self._connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def close(self) -> None:
        self._connection.close()


def record(client: RawClient, replies: Replies, is_right: Callable[[bytes], bool]) -> None:
    """Sends one request and records it; a 503 must have a Retry-After, and a 200 must be right."""
    began = time.monotonic()
    try:
        status, headers, body = client.post()
    except (OSError, http.client.HTTPException) as error:
        status, headers, body = 0, {}, repr(error).encode()
        client.close()
    took = time.monotonic() - began
    with replies.lock:
        replies.statuses[status] += 1
        if status == 200:
            replies.seconds.append(took)
            if not is_right(body):
                replies.faults.append("a wrong answer")
        elif status == 503:
            replies.refused_s.append(took)
            after = headers.get("retry-after", "")
            if not (after.isdigit() and int(after) >= 1):
                replies.faults.append(f"503 with Retry-After {after!r}: {body[:200]!r}")
        else:
            replies.faults.append(f"status {status}: {body[:200]!r}")


def open_loop(
    clients: list[RawClient], per_s: float, seconds: float, replies: Replies, is_right: Callable[[bytes], bool]
) -> None:
    """Sends so many requests a second, whether or not earlier ones are answered, as long as a client is free."""
    end = time.monotonic() + seconds

    def work(i: int, client: RawClient) -> None:
        due = time.monotonic() + i / per_s
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            record(client, replies, is_right)
            # a client that was held up does not catch up: that would be a burst
            due = max(due + len(clients) / per_s, time.monotonic())

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
