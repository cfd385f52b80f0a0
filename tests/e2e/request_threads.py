"""Threads that send requests, without any retries, and record the responses."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import dat_client.wire as wire
from tests.raw_requests import tensor


@dataclass
class Load:
    """The responses: the time, the error or status, and for 200 the fingerprint and the bytes of the images."""

    results: list[tuple[float, str, str, bytes]] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [outcome for _, outcome, _, _ in self.results if outcome != "200"]

    def good_after(self, moment: float) -> bool:
        return any(when > moment and outcome == "200" for when, outcome, _, _ in list(self.results))


def infer_body(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Returns body and headers of a request for Q(x), with binary tensors."""
    entry, data = tensor("images", images, "UINT8")
    header = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    return header + data, {"Inference-Header-Content-Length": str(len(header))}


def ask(
    connection: http.client.HTTPConnection, path: str, body: bytes, headers: dict[str, str]
) -> tuple[str, str, bytes]:
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        return f"{response.status} {answer[:200]!r}", "", b""
    length = int(response.headers["Inference-Header-Content-Length"])
    parsed = wire.decode_response(answer, length)
    return "200", str(parsed.parameters["fingerprint"]), bytes(memoryview(parsed.outputs["reconstruction"]))


@contextmanager
def load(url: str, codec: str, images: np.ndarray, threads: int = 4, pause_s: float = 0.05) -> Iterator[Load]:
    """Sends `images` over one connection per thread until the block ends.

    Pauses between requests, because processes that are started meanwhile need the cores too.
    """
    parts = urlsplit(url)
    body, headers = infer_body(images)
    path = f"{parts.path}/v2/models/{codec}/infer"
    traffic = Load()
    end = threading.Event()

    def send() -> None:
        connection: Any = None
        while not end.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
                traffic.results.append((time.monotonic(), *ask(connection, path, body, headers)))
            except (OSError, http.client.HTTPException) as error:
                traffic.results.append((time.monotonic(), f"{type(error).__name__}: {error}", "", b""))
                connection.close()
                connection = None
            end.wait(pause_s)
        if connection is not None:
            connection.close()

    workers = [threading.Thread(target=send) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield traffic
    finally:
        end.set()
        for worker in workers:
            worker.join(60)
