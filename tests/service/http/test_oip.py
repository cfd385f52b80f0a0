"""What of a request is parsed on the event loop, and what in a thread beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from dat_service.http.oip import SMALL_JSON, decode
from dat_service.settings import Settings
from dat_service.worker import CodecWorker, Reservation

T = TypeVar("T")


class CountingWorker(CodecWorker):
    """Counts the tasks that are run in a thread."""

    threads_used = 0

    async def run_in_thread(self, task: Callable[[], T]) -> T:
        self.threads_used += 1
        return task()


def image(datatype: str, nbytes: int) -> dict[str, Any]:
    shape = [1] if datatype == "BYTES" else [1, 3, 8, 8]
    return {"name": "images", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": nbytes}}


@pytest.mark.parametrize(
    ("document", "data", "threads"),
    [
        (json.dumps({"inputs": [image("UINT8", 192)]}), bytes(192), 0),
        (json.dumps({"inputs": [image("BYTES", 8)]}), b"\4\0\0\0JPEG", 1),
        (json.dumps({"inputs": [image("BYTES", 8)]}).replace("BYTES", r"\u0042YTES"), b"\4\0\0\0JPEG", 1),
        (json.dumps({"inputs": [image("UINT8", 192)]}) + " " * SMALL_JSON, bytes(192), 1),
    ],
    ids=["tensor", "pictures", "escaped", "long"],
)
def test_slow_parsing_leaves_the_event_loop_free(document: str, data: bytes, threads: int) -> None:
    worker = CountingWorker(Settings(codec="identity"))
    body = memoryview(document.encode() + data)
    checked = asyncio.run(decode(worker, body, str(len(document)), Reservation(worker, "peer/")))
    assert list(checked.message.inputs) == ["images"]
    assert worker.threads_used == threads
