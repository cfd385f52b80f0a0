"""Everything that a request holds between parsing and codec is reserved, or refused at once."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dat_client.errors import WireError
from dat_service.http.oip import SMALL_JSON, decode
from dat_service.inference import Caller, infer
from dat_service.settings import Settings
from dat_service.worker import CodecWorker
from dat_workers.errors import InvalidInput
from tests.conftest import crop
from tests.raw_requests import encoded

SMALL: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 8, 8], "data": [0] * 192}


@pytest.fixture(scope="module")
def worker() -> Iterator[CodecWorker]:
    worker = CodecWorker(Settings(codec="identity"))
    worker.load()
    yield worker
    worker.stop()


async def ask(worker: CodecWorker, request: dict[str, Any]) -> None:
    body = json.dumps(request, separators=(",", ":")).encode()
    with worker.admit("", len(body)) as reservation:
        await infer(worker, await decode(worker, memoryview(body), None, reservation), Caller(), reservation)


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"alpha": [{}] * 25_000}},
        {"parameters": {"made-up": [{}] * 25_000}},
        {"outputs": {"made-up": [{}] * 25_000}},
        {"inputs": [{"name": str(i), "datatype": "UINT8", "shape": [0], "data": []} for i in range(1_500)]},
    ],
    ids=["value", "name", "wrong", "inputs"],
)
def test_no_request_waits_with_all_that_was_parsed_of_it(worker: CodecWorker, more: dict[str, Any]) -> None:
    """Parsed JSON takes 24 times its text: four threads parse at once, and refused requests are freed."""

    async def many(count: int) -> int:
        tracemalloc.start()
        try:
            results = await asyncio.gather(
                *(ask(worker, {"inputs": [SMALL], **more}) for _ in range(count)), return_exceptions=True
            )
            assert {type(error) for error in results} <= {InvalidInput, WireError}
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert len(json.dumps(more)) > SMALL_JSON
    asyncio.run(many(1))
    one = asyncio.run(many(1))
    assert asyncio.run(many(14)) < 8 * one


@pytest.mark.parametrize("name", ["alpha", "made-up"])
def test_nor_one_that_was_parsed_at_once(worker: CodecWorker, name: str) -> None:
    body = json.dumps({"inputs": [SMALL], "parameters": {name: [{}]}}).encode()
    with worker.admit("", len(body)) as reservation, pytest.raises(InvalidInput, match=name):
        asyncio.run(decode(worker, memoryview(body), None, reservation))


def test_tensors_that_are_copies_are_counted(worker: CodecWorker) -> None:
    pictures = [encoded(crop("coffee", 64, 64), "PNG")] * 2
    data = b"".join(len(p).to_bytes(4, "little") + p for p in pictures)
    entries = {
        "numbers": {"name": "images", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0] * 192},
        "bytes": {"datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(data)}},
        "views": {"datatype": "FP32", "shape": [2, 3, 8, 8], "parameters": {"binary_data_size": 2 * 192 * 4}},
    }
    copied = {"numbers": 4 * 192, "bytes": sum(map(len, pictures)), "views": 0}
    tails = {"numbers": b"", "bytes": data, "views": bytes(2 * 192 * 4)}
    for kind, entry in entries.items():
        head = json.dumps({"inputs": [{"name": "images"} | entry]}).encode()
        body = np.frombuffer(head + tails[kind], np.uint8).data
        with worker.admit("", len(body)) as reservation:
            asyncio.run(decode(worker, body, str(len(head)), reservation))
            assert worker.held_bytes == copied[kind], kind
