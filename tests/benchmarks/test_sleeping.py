"""The sleeping stand-in is called by the service: each request takes as long as its images sleep."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.stand_ins.sleeping import BATCH, name_of, sleeping_service
from dat_client import Client

MS_PER_IMAGE = 50.0
IMAGES = np.full((BATCH, 3, 16, 16), 100, np.uint8)
SLEEP_S = BATCH * MS_PER_IMAGE / 1000


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_request_sleeps_and_gpus_sleep_at_the_same_time(gpus: int) -> None:
    with sleeping_service(MS_PER_IMAGE, gpus=gpus) as url, Client(url, name_of(MS_PER_IMAGE)) as client:

        def call(_: int) -> None:
            q = client.discretize(IMAGES, outputs=["reconstruction"])
            assert (q.reconstruction == 100).all()

        def seconds(calls: int) -> float:
            started = time.perf_counter()
            with ThreadPoolExecutor(calls) as pool:
                list(pool.map(call, range(calls)))
            return time.perf_counter() - started

        assert seconds(1) >= SLEEP_S
        if gpus == 1:
            assert seconds(2) >= 2 * SLEEP_S
        else:
            assert min(seconds(2) for _ in range(3)) < 2 * SLEEP_S
        gradients = np.ones(IMAGES.shape, np.float16)
        started = time.perf_counter()
        client.discretize(IMAGES, gradients=gradients, outputs=["adversarial"])
        assert time.perf_counter() - started >= SLEEP_S
