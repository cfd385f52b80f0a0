"""The codec's thread: whose rows go together, who gets what, and what happens when something fails."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_workers.batching.batcher import Batcher
from dat_workers.codecs.spec import CodecSpec
from dat_workers.discretizer import Discretizer
from dat_workers.engines.base import Engine
from dat_workers.errors import DeadlinePassed, EngineError, Full, OutOfMemory, Unhealthy

SPEC = CodecSpec(
    "inverting-stand-in", ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, attn_resolutions=(32,), codebook_size=256,
    latent_dim=4,
)  # fmt: skip


class InvertingStandIn(Engine):
    """An engine that is no codec: tokens are one pixel of each 8 x 8, inverted, and pictures are made of them."""

    name, batch = "inverting-stand-in", 8

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.before: Callable[[Tensor], None] = lambda images: None

    def encode(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        self.before(images)
        return 255 - (images[:, 0, ::8, ::8] * 255).round().long()

    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        picture = (indices.float() / 255).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return picture[:, None].expand(-1, 3, -1, -1)


class Codec:
    """A batcher over the stand-in, and a door that the codec waits at."""

    def __init__(self, **settings: Any) -> None:
        self.engine = InvertingStandIn()
        self.discretizer = Discretizer(SPEC, "f", self.engine)
        self.seen: list[tuple[int, int]] = []
        self.batcher = Batcher(on_batch=lambda rows, capacity, s: self.seen.append((rows, capacity)), **settings)
        self.batcher.start(lambda: self.discretizer)

    def submit(self, values: list[int], flow: str = "", side: int = 224, deadline: float | None = None) -> Any:
        images = np.empty((len(values), 3, side, side), np.uint8)
        images[:] = np.array(values, np.uint8)[:, None, None, None]
        return self.batcher.submit(self.discretizer.prepare(images), flow, deadline)

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """The codec stands still with a request of its own until the end of this."""
        there, go = threading.Event(), threading.Event()

        def wait(_: Tensor) -> None:
            there.set()
            assert go.wait(30)

        self.engine.before = wait
        first = self.submit([0], flow="door")
        assert there.wait(30)
        self.engine.before = lambda images: None
        self.engine.batches.clear()
        try:
            yield
        finally:
            go.set()
        first.result(30)


@pytest.fixture
def codec() -> Iterator[Codec]:
    made = Codec()
    yield made
    made.batcher.stop()


def values(result: Any) -> list[int]:
    picture = result.outputs["reconstruction"]
    assert all(len(np.unique(row)) == 1 for row in picture)
    return [int(row[0, 0, 0]) for row in picture]


def inverted(given: list[int]) -> list[int]:
    return [255 - value for value in given]


def test_small_requests_are_joined_and_each_gets_its_own(codec: Codec) -> None:
    asked = [[i, 100 + i] for i in range(8)]
    with codec.held_up():
        futures = [codec.submit(rows, flow=str(i)) for i, rows in enumerate(asked)]
        assert codec.batcher.queued == 16
    assert [values(f.result(30)) for f in futures] == [inverted(rows) for rows in asked]
    assert codec.engine.batches == [8, 8]
    assert codec.seen[-1] == (8, 8)


def test_a_large_request_is_split(codec: Codec) -> None:
    rows = list(range(21))
    result = codec.submit(rows).result(30)
    assert values(result) == inverted(rows)
    assert codec.engine.batches == [8, 8, 5]
    assert result.codec_s > 0


def test_sizes_are_kept_apart(codec: Codec) -> None:
    with codec.held_up():
        futures = [codec.submit([i], flow=str(i), side=side) for i, side in enumerate([224, 112, 224, 112])]
    assert [values(f.result(30)) for f in futures] == [[255 - i] for i in range(4)]
    assert codec.engine.batches == [2, 2]


def test_a_flood_does_not_starve_a_small_client(codec: Codec) -> None:
    with codec.held_up():
        flood = [codec.submit([1] * 40, flow="flood") for _ in range(5)]
        small = codec.submit([2], flow="small")
        done_before: list[bool] = []
        small.add_done_callback(lambda _: done_before.extend(f.done() for f in flood))
    assert values(small.result(30)) == [253]
    assert done_before == [False] * 5
    assert all(values(f.result(30)) == [254] * 40 for f in flood)


def test_what_is_cancelled_leaves_the_queue(codec: Codec) -> None:
    with codec.held_up():
        futures = [codec.submit([i], flow=str(i)) for i in range(3)]
        assert futures[1].cancel()
        assert codec.batcher.queued == 2
    assert [values(futures[i].result(30)) for i in (0, 2)] == [[255], [253]]
    with pytest.raises(CancelledError):
        futures[1].result()
    assert codec.engine.batches == [2]


def test_what_is_late_is_not_computed(codec: Codec) -> None:
    with codec.held_up():
        late = codec.submit([1], deadline=time.monotonic() + 0.5)
        kept = codec.submit([2], deadline=time.monotonic() + 60)
        time.sleep(0.6)
    assert values(kept.result(30)) == [253]
    with pytest.raises(DeadlinePassed):
        late.result(30)
    assert codec.engine.batches == [1]


def test_a_batch_waits_to_be_filled() -> None:
    codec = Codec(max_wait_s=30.0)
    futures = [codec.submit([i] * 4, flow=str(i)) for i in range(2)]
    assert [values(f.result(20)) for f in futures] == [[255] * 4, [254] * 4]  # full: it did not wait 30 s
    assert codec.engine.batches == [8]
    codec.batcher.stop()


def test_too_long_a_queue_is_refused_with_the_time_to_come_back() -> None:
    codec = Codec(max_queue_s=4.0)
    try:
        codec.engine.before = lambda images: time.sleep(0.2)
        codec.submit([0]).result(30)  # one row was measured: 0.2 s or more
        with codec.held_up():
            flood = codec.submit([1] * 800, flow="flood")
            with pytest.raises(Full, match="wait is about") as refused:
                codec.submit([2], flow="flood")
            assert refused.value.retry_after_s >= 1
            other = codec.submit([3], flow="somebody else")
            flood.cancel()
        assert values(other.result(30)) == [252]
    finally:
        codec.batcher.stop()


def test_tiny_images_do_not_make_the_codec_look_slow(codec: Codec) -> None:
    codec.engine.before = lambda images: time.sleep(0.02)  # whatever the images' size
    for _ in range(3):
        codec.submit([1] * 8).result(30)
    before = codec.batcher._seconds_per_cost
    for _ in range(5):
        codec.submit([1], side=32).result(30)
    assert codec.batcher._seconds_per_cost < 20 * before  # of one tiny image alone: 400 times


def test_nothing_is_kept_of_what_is_done(codec: Codec) -> None:
    images = np.zeros((3, 3, 224, 224), np.uint8)
    future = codec.batcher.submit(codec.discretizer.prepare(images))
    made = weakref.ref(future.result(30).outputs["reconstruction"])
    given = weakref.ref(images)
    del images, future
    deadline = time.monotonic() + 10
    while made() is not None or given() is not None:
        assert time.monotonic() < deadline, (made(), given())
        time.sleep(0.01)


def test_out_of_memory_halves_the_batch_once(codec: Codec) -> None:
    def scarce(images: Tensor) -> None:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    codec.engine.before = scarce
    rows = list(range(8))
    assert values(codec.submit(rows).result(30)) == inverted(rows)
    assert codec.engine.batches == [8, 4, 4]
    codec.engine.before = lambda images: scarce(torch.zeros(8))
    with pytest.raises(OutOfMemory, match="4 images at once: CUDA out of memory"):
        codec.submit(rows).result(30)
    codec.engine.before = lambda images: None
    assert values(codec.submit([7]).result(30)) == [248]
    assert not codec.batcher.why_unhealthy


def test_a_request_that_spoils_a_batch_fails_alone(codec: Codec) -> None:
    def spoil(images: Tensor) -> None:
        if (images * 255).round().eq(13).any():
            raise ValueError("thirteen")

    with codec.held_up():
        codec.engine.before = spoil
        futures = [codec.submit([i], flow=str(i)) for i in (12, 13, 14)]
    assert [values(futures[i].result(30)) for i in (0, 2)] == [[243], [241]]
    with pytest.raises(ValueError, match="thirteen"):
        futures[1].result(30)


def test_an_image_that_is_not_finite_fails_its_own_request(codec: Codec) -> None:
    encode = codec.engine.encode

    def marked(images: Tensor) -> Tensor:
        indices = encode(images)
        return indices.where((images * 255).round().amax((1, 2, 3))[:, None, None] != 5, -1)

    codec.engine.encode = marked  # type: ignore[method-assign]
    with codec.held_up():
        good, bad = codec.submit([1], flow="a"), codec.submit([2, 5], flow="b")
    assert values(good.result(30)) == [254]
    with pytest.raises(EngineError, match=r"images \[1\]"):
        bad.result(30)


def test_a_lost_device_fails_all_and_is_said(codec: Codec) -> None:
    def lose(_: Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with codec.held_up():
        codec.engine.before = lose
        futures = [codec.submit([i] * 8, flow=str(i)) for i in range(3)]
    for future in futures:
        with pytest.raises(Unhealthy, match="illegal memory access"):
            future.result(30)
    assert "illegal memory access" in codec.batcher.why_unhealthy
    with pytest.raises(Unhealthy):
        codec.submit([1])


def test_a_hung_engine_is_given_up() -> None:
    codec = Codec(watchdog_s=0.3)
    go = threading.Event()
    codec.engine.before = lambda images: go.wait(60) and None
    futures = [codec.submit([1]), codec.submit([2])]
    for future in futures:
        with pytest.raises(Unhealthy, match="hangs"):
            future.result(30)
    assert "hangs" in codec.batcher.why_unhealthy
    go.set()


def test_stopping_refuses_what_waits(codec: Codec) -> None:
    with codec.held_up():
        waiting = codec.submit([1])
        codec.batcher.stop()
    with pytest.raises(Unhealthy, match="shutting down"):
        waiting.result(30)


def test_what_cannot_be_loaded_is_raised() -> None:
    def make() -> Discretizer:
        raise ValueError("no such codec")

    with pytest.raises(ValueError, match="no such codec"):
        Batcher().start(make)


def test_many_threads_get_their_own_rows(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    asked = [[int(v) for v in rng.integers(0, 256, rng.integers(1, 20))] for _ in range(60)]
    results: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        results[i] = values(codec.submit(asked[i], flow=str(i % 5), side=64 if i % 3 else 32).result(60))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {i: inverted(rows) for i, rows in enumerate(asked)}
