"""What the tests of refused requests share: a service with low limits, and the check of what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.raw_requests import (
    Reply,
    infer_images,
)

GOOD = np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8)


LIMITS: dict[str, Any] = {
    "codec": "identity",
    "max_images": 16,
    "max_image_pixels": 1_000_000,
    "max_pixels": 2_000_000,
    "max_body_bytes": 8 << 20,
}


@pytest.fixture(scope="module")
def identity(serve_app: Callable[..., str]) -> str:
    return serve_app(**LIMITS)


@pytest.fixture(autouse=True)
def next_request_works(identity: str) -> Any:
    yield
    reply = infer_images(identity, GOOD, "UINT8", parameters={"binary_data_output": True})
    assert reply.status == 200, reply.body
    assert reply.body.endswith(GOOD.tobytes())


def refused(reply: Reply, status: int, field: str, value: str, limit: str) -> None:
    assert reply.status == status, reply.body
    error = reply.error
    assert error["field"] == field
    assert value in str(error["value"])
    assert limit in str(error["limit"])
    assert field in error["error"]
