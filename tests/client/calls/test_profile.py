"""Profiles split the time of a client's calls into stages."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from dat_client import AsyncClient, Client
from dat_client.calls import core
from dat_client.calls.profile import STAGES, call_timing


def test_a_call_is_split_by_what_the_server_says(client, server, images):
    server.timing = "body;dur=3, queue;dur=5, codec;dur=20, total;dur=30"
    server.delay_s = lambda request: 0.05
    with client.profile() as profile:
        for _ in range(3):
            client.discretize(images)
        client.submit(images).result(20)
        client.decode(np.zeros((1, 2, 2), int))
    client.discretize(images)
    assert len(profile.calls) == 5
    for call in profile.calls:
        assert sum(getattr(call, stage) for stage in STAGES) == pytest.approx(call.total)
        assert (call.queue, call.codec) == (0.005, 0.02)
        assert call.server == pytest.approx(0.002)
        assert call.network >= 0.05 - 0.027
    assert [call.images for call in profile.calls] == [4, 4, 4, 4, 1]
    assert profile.calls[0].sent > images.nbytes
    assert profile.calls[0].received > images.nbytes
    assert profile.medians()["codec"] == 0.02
    assert sum(profile.shares().values()) == pytest.approx(1)
    assert str(profile).startswith("5 calls in ")
    assert "codec         20.00 ms" in str(profile)


def test_without_server_timing_the_server_is_part_of_the_network(client, images):
    with client.profile() as profile:
        client.discretize(images)
    (call,) = profile.calls
    assert call.queue == call.codec == call.server == 0
    assert call.network > 0


def test_what_repeats_cost_is_not_the_networks(client, server, images):
    server.faults.extend(["status 503 0.05"] * 2)
    with client.profile() as profile:
        client.discretize(images)
    assert profile.calls[0].repeats >= 0.1


def test_a_call_in_parts_is_one_call(server, images):
    server.timing = "codec;dur=1, total;dur=1"
    with Client(server.url, max_in_flight=2) as client, client.profile() as profile:
        client.discretize(images)
    assert [(call.images, call.codec) for call in profile.calls] == [(4, 0.001)]
    assert profile.calls[0].received > images.nbytes


def test_profiles_may_overlap_and_be_empty(server, images):
    client = AsyncClient(server.url)
    with client.profile() as outer, client.profile() as inner:
        client._client.discretize(images)
    with client.profile() as none:
        pass
    client._client.close()
    assert len(outer.calls) == len(inner.calls) == 1
    assert str(none).startswith("0 calls")


def test_profiles_of_many_threads_do_not_lose_each_other(client):
    def work(_: int) -> bool:
        with client.profile() as profile:
            return profile in client._profiles.copy()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ExitStack() as others, ThreadPoolExecutor(8) as threads:
            for _ in range(300):  # the more there are, the longer is one let go
                others.enter_context(client.profile())
            assert all(threads.map(work, range(1000)))
    finally:
        sys.setswitchinterval(interval)
    assert not client._profiles


def test_a_server_that_claims_more_time_than_there_was_makes_nothing_negative(images):
    call = core.discretize_call(images, None, "FP16", None, None, {})
    exchange = core.Exchange(None, {"total": 9.0, "codec": 8.0}, 10.0, 2.0, 1, 1)  # type: ignore[arg-type]
    timing = call_timing(call, exchange, 9.5, 3.0)
    assert all(getattr(timing, stage) >= 0 for stage in STAGES)
