"""`max_in_flight`: a batch in several requests at once comes back as if it were one."""

from __future__ import annotations

import asyncio
import threading
import warnings
from concurrent.futures import Future

import numpy as np
import pytest

from dat_client import AsyncClient, Client, InvalidRequest, ProtocolError, Unavailable, UnknownCodec
from dat_client.calls import core
from dat_client.transports.split import cut, infer
from tests.client.loopback import client_threads

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def split(server):
    with Client(server.url, timeout_s=20, max_in_flight=3) as client:
        yield client


def numbered(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 8, 16), np.uint8)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [1, 1]), (7, [2, 2, 3]), (9, [3, 3, 3])])
def test_rows_come_back_in_their_order(split, server, count, sizes):
    server.delay_s = lambda request: 0.02 * (9 - int(request.inputs["images"][0, 0, 0, 0])) / 9
    q = split.discretize(numbered(count), outputs=["reconstruction", "indices"])
    assert np.array_equal(q.reconstruction, numbered(count))
    assert q.indices[:, 0, 0].tolist() == list(range(count))
    assert q.indices.dtype == np.uint16
    assert sorted(len(request.inputs["images"]) for request in server.requests) == sizes
    assert q.reconstruction.flags.writeable


def test_parts_are_in_flight_at_the_same_time(split, server):
    server.every = "gate"
    future = split.submit(numbered(6))
    assert all(server.entered.acquire(timeout=20) for _ in range(3))
    server.release.set()
    assert np.array_equal(future.result(20).reconstruction, numbered(6))


def test_submitted_calls_do_not_take_the_threads_of_their_parts(server):
    before = client_threads()
    with Client(server.url, timeout_s=20, max_connections=2, max_in_flight=4) as client:
        futures = [client.submit(numbered(8) + n) for n in range(10)]
        for n, future in enumerate(futures):
            assert np.array_equal(future.result(20).reconstruction, numbered(8) + n)
    assert server.connections <= 2
    assert client_threads() <= before


@pytest.mark.parametrize("dtype", ["FP16", "FP32", "INT8"])
def test_gradients_and_scales_are_cut_as_the_images_are(images, dtype):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=images.shape).astype(np.float32)
    gradients *= 10.0 ** -np.arange(4, dtype=np.float32)[:, None, None, None]
    call = core.discretize_call(images, gradients, dtype, None, None, {"alpha": 0.1})
    pieces = cut(call, 3)
    assert [rows for rows, _ in pieces] == [slice(0, 1), slice(1, 2), slice(2, 4)]
    for name, array in call.inputs.items():
        assert np.array_equal(np.concatenate([part.inputs[name] for _, part in pieces]), array)
        assert all(np.shares_memory(part.inputs[name], array) for _, part in pieces)
    assert len({part.id for _, part in pieces}) == 3
    assert {tuple(part.parameters) for _, part in pieces} == {("alpha",)}


def test_torch_encoded_pictures_and_tokens(split, server):
    torch = pytest.importorskip("torch")
    images = torch.from_numpy(numbered(7))
    assert torch.equal(split.discretize(images).reconstruction, images)
    pictures = [PNG + b"x" * n for n in range(5)]
    assert split.discretize(pictures).reconstruction[:, 0, 0, 0].tolist() == [8, 9, 10, 11, 12]
    tokens = np.arange(5)[:, None, None] * np.ones((1, 2, 2), int)
    assert split.decode(tokens)[:, 0, 0, 0].tolist() == list(range(5))
    assert len(server.requests) == 9


def test_the_share_of_tokens_changed_is_weighted_by_rows(split, server):
    def with_share(answer):
        rows = answer["outputs"]["reconstruction"]
        return {**answer, "parameters": {"fingerprint": "f", "tokens_changed": float(rows[:, 0, 0, 0].mean()) / 10}}

    server.change = with_share
    assert split.discretize(numbered(7)).tokens_changed == pytest.approx(0.3)


def test_a_failing_part_fails_the_call_with_its_rows(split, server):
    def second_is_wrong(answer):
        first = int(answer["outputs"]["reconstruction"][0, 0, 0, 0])
        return {**answer, "id": "other"} if first == 2 else answer

    server.change = second_is_wrong
    with pytest.raises(ProtocolError, match=r"images 2\.\.3 of 6: .*belongs to request 'other'"):
        split.discretize(numbered(6))
    server.change = lambda answer: answer
    assert np.array_equal(split.discretize(numbered(6)).reconstruction, numbered(6))


def test_what_the_server_says_of_a_part_keeps_its_kind(server):
    with (
        Client(server.url, codec="none", max_in_flight=2) as client,
        pytest.raises(UnknownCodec, match=r"images [02]\.\."),
    ):
        client.discretize(numbered(4))


def test_a_failed_part_stops_the_repeats_of_the_others(server):
    server.faults.extend(["status 503 30", "status 422"])
    with Client(server.url, timeout_s=60, max_in_flight=2) as client:
        with pytest.raises(InvalidRequest, match="images"):
            client.discretize(numbered(4))
        client._parts_executor.shutdown()  # waits for the threads; closing would end their waits itself
    assert len(server.paths) == 2  # none has waited out its 30 s


def test_a_part_that_gets_no_thread_stops_the_others(images):
    call = core.discretize_call(images, None, "FP16", None, None, {})
    stops: list[threading.Event] = []
    begun: Future[core.Exchange] = Future()

    def send_part(part: core.Call, stop: threading.Event) -> core.Exchange:
        stops.append(stop)
        raise Unavailable("repeated until it is stopped")

    def spawn(ask):
        if stops:
            raise RuntimeError("can't start new thread")
        with pytest.raises(Unavailable):
            ask()
        return begun

    with pytest.raises(RuntimeError, match="new thread"):
        infer(call, 2, send_part, spawn)
    assert [stop.is_set() for stop in stops] == [True]
    assert begun.cancelled()


def test_lost_parts_are_repeated_alone(split, server):
    server.faults.extend(["short", "status 503 0", "", "drop after reading"])
    assert np.array_equal(split.discretize(numbered(9)).reconstruction, numbered(9))
    assert len(server.paths) == 6


def test_answers_of_two_codecs_are_asked_for_again(split, server):
    answered = []

    def rolling(answer):
        answered.append(answer)
        fingerprint = "old" if len(answered) <= 2 else "new"
        return {**answer, "parameters": {"fingerprint": fingerprint}}

    server.change = rolling
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split.discretize(numbered(6)).fingerprint == "new"
    assert len(server.requests) == 6
    server.change = lambda answer: {**answer, "parameters": {"fingerprint": answer["id"]}}
    with (
        Client(server.url, retries=2, max_in_flight=3) as client,
        pytest.raises(Unavailable, match=r"retries=2, 3 attempts.*answered by different codecs"),
    ):
        client.discretize(numbered(6))


def test_pictures_of_two_sizes_are_refused(split, server):
    def second_is_larger(answer):
        rows = answer["outputs"]["reconstruction"]
        larger = np.zeros((len(rows), 3, 16, 16), np.uint8)
        return {**answer, "outputs": {"reconstruction": larger if rows[0, 0, 0, 0] == 9 else rows}}

    server.change = second_is_larger
    with pytest.raises(InvalidRequest, match="pictures of one size"):
        split.discretize([PNG, PNG + b"1", PNG + b"22"])


def test_one_deadline_for_all_parts(server):
    server.every = "hang"
    with (
        Client(server.url, timeout_s=0.3, max_in_flight=3) as client,
        pytest.raises(Unavailable, match=r"images .*timed out after timeout_s=0\.3"),
    ):
        client.discretize(numbered(6))


def test_async(server):
    async def main() -> None:
        async with AsyncClient(server.url, max_in_flight=3) as client:
            answers = await asyncio.gather(*(client.discretize(numbered(6) + n) for n in range(8)))
            assert all(np.array_equal(q.reconstruction, numbered(6) + n) for n, q in enumerate(answers))

    asyncio.run(main())
    assert len(server.requests) == 24
