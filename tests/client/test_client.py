from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dat_client import Client, InvalidRequest, ProtocolError, Unavailable, UnknownCodec

from .loopback import FINGERPRINT, Server, client_threads, running

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_dtype_in_is_dtype_out(client, images, dtype):
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    q = client.discretize(images)
    assert q.reconstruction.dtype == dtype
    assert np.array_equal(q.reconstruction, images)
    assert (q.codec, q.fingerprint) == ("tiny-f8", FINGERPRINT)
    assert q.indices is None
    assert q.adversarial is None
    assert q.adversarial_indices is None
    assert q.reconstruction.flags.writeable


def test_output_dtype_is_sent_only_when_asked(client, server, images):
    assert client.discretize(images, output_dtype="FP32").reconstruction.dtype == np.float32
    client.discretize(images, preset="paper")
    assert [request.parameters for request in server.requests] == [{"output_dtype": "FP32"}, {"preset": "paper"}]


def test_outputs_are_what_was_asked_for(client, images):
    q = client.discretize(images, outputs=["indices"])
    assert q.reconstruction is None
    assert q.indices.shape == (4, 2, 3)
    assert q.indices.dtype == np.uint16


def test_encoded_pictures(client):
    q = client.discretize([PNG, PNG + b"12"])
    assert q.reconstruction[:, 0, 0, 0].tolist() == [8, 10]
    assert q.reconstruction.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_decode(client, server, dtype):
    pictures = client.decode(np.arange(4, dtype=dtype).reshape(1, 2, 2))
    assert pictures.shape == (1, 3, 16, 16)
    assert pictures[0, 0, ::8, ::8].tolist() == [[0, 1], [2, 3]]
    assert server.requests[0].inputs["indices"].dtype == np.uint16


def test_strided_images_arrive_right(client, images):
    turned = images.transpose(0, 1, 3, 2)[:, ::-1]
    assert np.array_equal(client.discretize(turned).reconstruction, turned)


def test_chunked_answers_are_understood(client, server, images):
    server.every = "chunked"
    for _ in range(2):
        assert np.array_equal(client.discretize(images).reconstruction, images)
    assert server.connections == 1


def test_connections_are_reused(client, server, images):
    for _ in range(10):
        client.discretize(images)
    client.metadata()
    assert server.connections == 1


def test_bodies_larger_than_every_buffer(client, server):
    images = np.random.default_rng(1).integers(0, 256, (32, 3, 224, 224), np.uint8)
    assert np.array_equal(client.discretize(images).reconstruction, images)


def test_metadata_and_health(client, server):
    assert client.metadata()["name"] == "tiny-f8"
    assert client.server_metadata()["name"] == "loopback"
    assert client.live() is True
    assert client.ready() is True
    server.ready_after = 1
    assert client.ready() is False
    server.ready_after = 2
    client.wait_ready(20)


def test_wait_ready_says_what_was_wrong(client, server):
    server.ready_after = 10**6
    with pytest.raises(Unavailable, match=r"not ready after 0.6 s.*503"):
        client.wait_ready(0.6)


def test_unknown_codec(server, images):
    with Client(server.url, codec="a/b ü") as client:
        for ask in (client.metadata, client.ready, client.wait_ready, lambda: client.discretize(images)):
            with pytest.raises(UnknownCodec, match="no such codec"):
                ask()
        assert client.live()
    assert server.paths[0] == "/v2/models/a%2Fb%20%C3%BC"


def test_base_path_is_kept(server, images):
    server.prefix = "/codecs/one"
    for url in (server.url, server.url + "/"):
        with Client(url) as client:
            assert np.array_equal(client.discretize(images).reconstruction, images)
            assert client.ready()


def test_api_key_is_sent_and_never_shown(server, images):
    with Client(server.url, api_key="secret") as client:
        client.discretize(images)
        assert "secret" not in repr(client)
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"url": "codec:8000"}, "url"),
        ({"url": "ftp://codec"}, "url"),
        ({"url": "grpc://codec:8001"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://codec:port"}, "url"),
        ({"url": "http://me:pw@codec"}, "url"),
        ({"url": "http://codec?x=1"}, "url"),
        ({"url": None}, "url"),
        ({"url": "http://codec/a b"}, "url"),
        ({"url": "http://codec/a\n"}, "url"),
        ({"url": "http://co dec"}, "url"),
        ({"url": "http://codec/ü"}, "url"),
        ({"url": f"http://{'c' * 71}"}, "url"),
        ({"url": "http://a..b"}, "url"),
        ({"codec": ""}, "codec"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"connect_timeout_s": "5"}, "connect_timeout_s"),
        ({"retries": -1}, "retries"),
        ({"max_connections": 0}, "max_connections"),
        ({"api_key": "a\r\nb"}, "api_key"),
        ({"api_key": b"secret"}, "api_key"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, field):
    with pytest.raises(InvalidRequest) as caught:
        Client(**{"url": "http://codec:8000", **arguments})
    assert caught.value.field == field
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [1e7, 1e11, 1e300, 10**400])
def test_a_timeout_may_be_as_long_as_it_likes(server, images, timeout_s):
    server.faults.append("status 503 0")
    with Client(server.url, timeout_s=timeout_s, connect_timeout_s=timeout_s) as client:
        assert np.array_equal(client.discretize(images, timeout_s=timeout_s).reconstruction, images)
        assert client.live()
        client.wait_ready(timeout_s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: {**answer, "id": "other"}, "belongs to request 'other'"),
        (lambda answer: {**answer, "id": None}, "belongs to request None"),
        (lambda answer: {**answer, "outputs": {}}, "lacks reconstruction"),
        (
            lambda answer: {**answer, "outputs": {"reconstruction": np.zeros((3, 3, 16, 24), np.uint8)}},
            "shape",
        ),
        (
            lambda answer: {**answer, "outputs": {"reconstruction": np.zeros((4, 3, 16, 16), np.uint8)}},
            "shape",
        ),
    ],
)
def test_another_requests_answer_is_never_taken(client, server, images, change, message):
    server.change = change
    with pytest.raises(ProtocolError, match=message):
        client.discretize(images)


def test_an_answer_without_the_default_outputs_is_refused(client, server, images):
    server.change = lambda answer: {**answer, "outputs": {"reconstruction": images}}
    assert np.array_equal(client.discretize(images, replace_fraction=0.0).reconstruction, images)
    with pytest.raises(ProtocolError, match="lacks adversarial"):
        client.discretize(images, np.ones(images.shape, np.float32))
    with pytest.raises(ProtocolError, match="lacks adversarial"):
        client.discretize(images, replace_fraction=0.5)
    assert client.discretize(images, outputs=["reconstruction"], replace_fraction=0.5).adversarial is None


@pytest.mark.parametrize("value", [10**400, -1, 1.5, "half", [0.5]])
@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_share_of_tokens_that_is_none_is_refused(server, images, value, max_in_flight):
    server.change = lambda answer: {**answer, "parameters": {"tokens_changed": value}}
    says = r"tokens_changed: .* must be a number in 0\.\.1"
    with Client(server.url, max_in_flight=max_in_flight) as client, pytest.raises(ProtocolError, match=says):
        client.discretize(images)


def test_one_client_in_many_threads_mixes_nothing_up(server):
    server.delay_s = lambda request: (int(request.inputs["images"][0, 0, 0, 0]) % 7) * 0.001
    with Client(server.url, max_connections=3) as client:

        def work(value: int) -> bool:
            images = np.full((2, 3, 8, 8 + value), value, np.uint8)
            return np.array_equal(client.discretize(images).reconstruction, images)

        with ThreadPoolExecutor(12) as threads:
            assert all(threads.map(work, range(60)))
    assert server.connections <= 3


def test_submit_gives_futures_in_the_order_of_the_calls(server):
    server.delay_s = lambda request: 0.01 * (3 - int(request.inputs["images"][0, 0, 0, 0]) % 4)
    with Client(server.url) as client:
        futures = [client.submit(np.full((1, 3, 8, 8), value, np.uint8)) for value in range(12)]
        assert [int(future.result(20).reconstruction[0, 0, 0, 0]) for future in futures] == list(range(12))


def test_submit_is_bounded_by_max_connections(server, images):
    server.every = "gate"
    before = client_threads()
    with Client(server.url, max_connections=2) as client:
        futures = [client.submit(images) for _ in range(5)]
        assert server.entered.acquire(timeout=10)
        assert server.entered.acquire(timeout=10)
        assert not server.entered.acquire(timeout=0.1)
        assert len(client_threads() - before) == 2
        server.release.set()
        assert all(np.array_equal(future.result(20).reconstruction, images) for future in futures)


def test_submit_checks_at_once_and_makes_no_thread_before(client, images):
    before = client_threads()
    with pytest.raises(InvalidRequest):
        client.submit(images[0])
    assert client_threads() <= before


def test_close_lets_submitted_calls_finish(server, images):
    server.delay_s = lambda request: 0.02
    client = Client(server.url, max_connections=2)
    futures = [client.submit(images) for _ in range(6)]
    client.close()
    client.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert "closed" in repr(client)
    for ask in (
        client.metadata,
        client.ready,
        lambda: client.discretize(images),
        lambda: client.submit(images),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            ask()


def test_repr():
    with Client("http://codec:8000/x/", codec="c", timeout_s=3) as client:
        assert repr(client) == "Client('http://codec:8000/x', codec='c', timeout_s=3)"


def test_two_servers_at_once(server: Server, images):
    with running() as server_b, Client(server.url) as client_a, Client(server_b.url) as client_b:
        client_a.discretize(images)
        client_b.discretize(images)
        client_b.discretize(images)
        assert (len(server.requests), len(server_b.requests)) == (1, 2)
