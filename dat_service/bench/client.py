"""Measures how a trainer's call divides its time among client, network, queue, codec and the rest of the server.

    dat bench client --url http://codec:8000 --codec tiny-f8 --batch 128 --size 224 --calls 20

It sends batches of random uint8 images, with up to `--in-flight` calls at the same time. `Client.profile` divides
the time of the calls with the help of the Server-Timing header in each response.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np

from dat_client import Client, Discretized

WARM_UP_CALLS = 3


def measure(
    url: str,
    codec: str,
    *,
    batch: int,
    size: int,
    calls: int,
    in_flight: int = 1,
    parts: int = 1,
    gradients: str = "none",
    timeout_s: float = 300.0,
    api_key: str | None = None,
) -> str:
    """Returns the table of `Client.profile` for `calls` calls, each with `batch` images of `size` x `size` pixels.

    Args:
        in_flight: Number of calls that are under way at the same time.
        parts: Number of requests into which each call is split; it becomes the client's `max_in_flight`.
        gradients: Dtype of the gradients that are sent with the images, or "none" to send no gradients.

    Raises:
        DatError: The service cannot be reached, or it refuses a call.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 3, size, size), np.uint8)
    options: dict[str, Any] = {}
    if gradients != "none":
        options = {"gradients": rng.normal(size=images.shape).astype(np.float32), "gradient_dtype": gradients}
    with Client(
        url,
        codec,
        timeout_s=timeout_s,
        max_in_flight=parts,
        max_connections=max(8, in_flight * parts),
        api_key=api_key,
    ) as client:
        client.wait_ready(timeout_s)
        for _ in range(WARM_UP_CALLS):
            client.discretize(images, **options)
        under_way: deque[Future[Discretized]] = deque()
        with client.profile() as profile:
            for _ in range(calls):
                if len(under_way) == in_flight:
                    under_way.popleft().result()
                under_way.append(client.submit(images, **options))
            while under_way:
                under_way.popleft().result()
    return f"{url}, {codec}, {batch} x 3 x {size} x {size} uint8, gradients {gradients}\n{profile}"
