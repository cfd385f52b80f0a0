"""A server that lies about lengths, datatypes and values: each answer is a clear error, and costs little memory."""

from __future__ import annotations

import asyncio
import io
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from dat_client import AsyncClient, Client, InvalidRequest, ProtocolError, Unavailable
from dat_client.calls.picture_size import picture_pixels

MOST_MEMORY = 12 << 20  # bytes; an honest answer may have 1 MiB beside its pictures
BLOCK = b"x" * (1 << 16)
HEAD = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 16\r\n"


class Endless:
    """Writes blocks until the client leaves, and counts them."""

    def __init__(self, head: bytes, block: bytes, most: int = 4 << 30) -> None:
        self.head, self.block, self.most, self.sent = head, block, most, 0

    def __call__(self, stream: BinaryIO, *_: Any) -> None:
        try:
            stream.write(self.head)
            while self.sent < self.most:
                stream.write(self.block)
                self.sent += len(self.block)
        except OSError:
            pass


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK)
ENDLESS = {
    "chunks": (HEAD + CHUNKED, CHUNK, "has more than .* bytes, must have at most"),
    "chunks of one byte": (HEAD + CHUNKED, b"1\r\nx\r\n" * 4096, "has more than .* bytes, must have at most"),
    "no length": (HEAD + b"\r\n", BLOCK, "has more than .* bytes, must have at most"),
    "a length of 3 GB": (HEAD + b"Content-Length: 3000000000\r\n\r\n", BLOCK, "has 3000000000 bytes, must have"),
    "a header line": (b"HTTP/1.1 200 OK\r\nX-Long: ", BLOCK, "head of the reply is not valid"),
    "header lines": (
        b"HTTP/1.1 200 OK\r\n",
        b"X-Many: 1\r\n" * 999,
        "not valid: .*100 headers",
    ),
    "a status line": (b"HTTP/1.1 200 ", BLOCK, "head of the reply is not valid"),
    "a body of status 206": (b"HTTP/1.1 206 Partial\r\n" + CHUNKED, CHUNK, "206: no inference service"),
}


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Fails a test that allocates more than MOST_MEMORY at once; arrays of numpy are counted too."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST_MEMORY


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_answer_ends_at_what_its_request_allows(client: Client, server, images, name: str) -> None:
    head, block, says = ENDLESS[name]
    server.raw = endless = Endless(head, block)
    with pytest.raises(ProtocolError, match=says):
        client.discretize(images)
    assert endless.sent < 32 << 20  # what the client took, and the buffers of the kernel
    assert len(server.paths) == 1
    server.raw = None
    assert np.array_equal(client.discretize(images).reconstruction, images)


@pytest.mark.usefixtures("bounded_memory")
def test_the_body_of_an_error_is_read_up_to_64_kib(client: Client, server, images) -> None:
    server.raw = Endless(b"HTTP/1.1 400 Bad\r\n" + CHUNKED, CHUNK)
    with pytest.raises(InvalidRequest, match=r"400 from .* begins with 'xxx"):
        client.discretize(images)
    server.raw = Endless(b"HTTP/1.1 422 Bad\r\nContent-Length: 3000000000\r\n\r\n", BLOCK)
    with pytest.raises(InvalidRequest, match=r"422 from .* begins with 'xxx"):
        client.discretize(images)
    server.raw = None
    assert np.array_equal(client.discretize(images).reconstruction, images)


OUTPUTS = b'"outputs":['


def replaced(old: bytes, new: bytes) -> Callable[[BinaryIO, bytes, int], None]:
    """Writes the honest answer with a change of its JSON."""

    def write(stream: BinaryIO, data: bytes, length: int) -> None:
        assert old in data[:length]
        text = data[:length].replace(old, new, 1)
        body = text + data[length:]
        stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body))
        stream.write(b"Inference-Header-Content-Length: %d\r\n\r\n%b" % (len(text), body))

    return write


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"{", b"{" + b" " * (3 << 19), "has 1577.* bytes, must have at most 1053184"),
        (OUTPUTS, OUTPUTS + b'{"name":"reconstruction","datatype":"UINT8","shape":[0],"data":[]},', "named twice"),
        (OUTPUTS, OUTPUTS + b'{"name":"b","datatype":"BYTES","shape":[2],"data":["",""]},', "too many elements"),
        (b'"model_name":"tiny-f8",', b"", "model_name"),
        (b'"shape":[4,3,16,24]', b'"shape":[4,3,16,25]', "needs 4800 bytes"),
        (b'"fingerprint"', b'"tokens_changed":1e999,"fingerprint"', "tokens_changed"),
        (b"sha256:1d", b"\xff\xff", "not JSON"),
    ],
)  # fmt: skip
def test_json_that_lies(client: Client, server, images, old: bytes, new: bytes, says: str) -> None:
    server.raw = replaced(old, new)
    with pytest.raises(ProtocolError, match=says):
        client.discretize(images)
    server.raw = None
    assert np.array_equal(client.discretize(images).reconstruction, images)


def test_a_compressed_answer_is_named(client: Client, server, images) -> None:
    def gzip(stream: BinaryIO, data: bytes, length: int) -> None:
        stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Encoding: gzip\r\n\r\nabcd")

    server.raw = gzip
    with pytest.raises(ProtocolError, match="Content-Encoding is 'gzip'"):
        client.discretize(images)


@pytest.mark.parametrize("status", [b"201 A", b"203 B", b"204 C", b"206 D", b"102 E", b"700 F"])
def test_no_other_status_is_a_success(client: Client, server, images, status: bytes) -> None:
    def write(stream: BinaryIO, data: bytes, length: int) -> None:
        stream.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n" % (status, len(data)))
        stream.write(b"Inference-Header-Content-Length: %d\r\n\r\n%b" % (length, data))

    server.raw = write
    with pytest.raises(ProtocolError, match=f"{status[:3].decode()}: no inference service"):
        client.discretize(images)
    assert len(server.paths) == 1
    server.raw = None
    assert np.array_equal(client.discretize(images).reconstruction, images)


def spoilt(value: float, dtype: Any = np.float32) -> np.ndarray:
    array = np.full((4, 3, 16, 24), 0.5, dtype)
    array[2, 1, 3, 5] = value
    return array


UINT8 = {"output_dtype": "UINT8", "outputs": ["reconstruction"]}
FP32 = {"output_dtype": "FP32", "outputs": ["reconstruction"]}
FP16 = {"output_dtype": "FP16", "outputs": ["reconstruction"]}
TOKENS = {"outputs": ["indices"]}
VALUES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (FP32, {"reconstruction": spoilt(np.nan)}, "reconstruction: the answer has values from nan to nan, must be"),
    (FP32, {"reconstruction": spoilt(np.inf)}, "values from 0.5 to inf"),
    (FP16, {"reconstruction": spoilt(1.01, np.float16)}, "values from 0.5 to 1.00977"),
    (FP16, {"reconstruction": spoilt(-1, np.float16)}, "values from -1 to 0.5"),
    (UINT8, {"reconstruction": spoilt(0)}, "datatype FP32, must be UINT8"),
    (FP32, {"reconstruction": spoilt(0, np.float16)}, "datatype FP16, must be FP32"),
    (FP32, {"reconstruction": spoilt(0, np.float64)}, "has 37.* bytes|datatype FP64, must be FP32"),
    (TOKENS, {"indices": np.full((4, 2, 3), -1, np.int32)}, "token -1, must be 0 or more"),
    (TOKENS, {"indices": np.zeros((4, 2, 3), np.int64)}, "datatype INT64, must be UINT16 or INT32"),
    (TOKENS, {"indices": np.zeros((4, 2, 3), np.float32)}, "datatype FP32"),
    (TOKENS, {"indices": np.zeros((3, 2, 3), np.uint16)}, r"shape \[3, 2, 3\], must be \[4,h,w\]"),
    (TOKENS, {"indices": np.zeros((4, 2, 9), np.uint16)}, "which no codec has for images of 16x24"),
    (TOKENS, {"indices": np.zeros((4, 0, 3), np.uint16)}, "shape"),
    (UINT8, {"reconstruction": np.zeros((4, 3, 16, 24), np.uint8), "indices": np.zeros((4, 2, 3), np.uint16)},
     r"not requested: \['indices'\]"),
    (UINT8, {"reconstruction": np.zeros((4, 3, 16, 24), np.uint8), "logits": np.zeros(3, np.float32)}, "'logits'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "outputs", "says"), VALUES)
def test_values_that_were_not_requested(client: Client, server, images, options, outputs, says) -> None:
    server.change = lambda answer: {**answer, "outputs": outputs}
    with pytest.raises(ProtocolError, match=says):
        client.discretize(images, **options)
    assert len(server.paths) == 1
    server.change = lambda answer: answer
    assert np.array_equal(client.discretize(images).reconstruction, images)


def test_every_door_checks(server, images) -> None:
    torch = pytest.importorskip("torch")
    from dat_client.torch import straight_through

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        answer["outputs"]["reconstruction"] = np.full_like(answer["outputs"]["reconstruction"], np.nan)
        return answer

    server.change = spoil

    async def through_asyncio() -> None:
        async with AsyncClient(server.url) as client:
            await client.discretize(images, output_dtype="FP32")

    with Client(server.url) as client, Client(server.url, max_in_flight=2) as parts:
        for call in (
            lambda: client.submit(images, output_dtype="FP32").result(20),
            lambda: parts.discretize(images, output_dtype="FP32"),
            lambda: straight_through(client, torch.from_numpy(images), output_dtype="FP32"),
            lambda: asyncio.run(through_asyncio()),
        ):
            with pytest.raises(ProtocolError, match="values from nan to nan"):
                call()


def test_decoded_tokens_are_checked(client: Client, server) -> None:
    tokens = np.arange(12).reshape(2, 2, 3)
    assert client.decode(tokens).shape == (2, 3, 16, 24)
    for wrong, says in (
        (np.zeros((2, 3, 16, 23), np.uint8), r"must be a multiple of the tokens' \[2, 3\]"),
        (np.zeros((2, 3, 16, 48), np.uint8), "must be a multiple"),
        (np.zeros((1, 3, 16, 24), np.uint8), r"must be \[2,3,H,W\]"),
        (np.zeros((2, 3, 16, 24), np.float32), "datatype FP32, must be UINT8"),
    ):
        server.change = lambda answer, wrong=wrong: {**answer, "outputs": {"reconstruction": wrong}}
        with pytest.raises(ProtocolError, match=says):
            client.decode(tokens)


def encoded(form: str, width: int = 40, height: int = 24, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


PICTURES = {
    "jpeg": encoded("jpeg"),
    "progressive jpeg": encoded("jpeg", progressive=True),
    "jpeg with EXIF": encoded("jpeg", exif=b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\xff\xc0" * 100),
    "png": encoded("png"),
    "webp": encoded("webp"),
    "lossless webp": encoded("webp", lossless=True),
    "extended webp": encoded("webp", exif=b"Exif\0\0II*\0\x08\0\0\0"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_size_of_an_encoded_picture_bounds_its_answer(client: Client, server, name: str) -> None:
    def answer_with(shape: tuple[int, ...]) -> None:
        server.change = lambda answer: {**answer, "outputs": {"reconstruction": np.zeros(shape, np.uint8)}}

    picture = PICTURES[name]
    assert picture_pixels(picture) == 960
    assert picture_pixels(picture[:11]) is None
    for wrong, says in (
        ((1, 3, 24, 41), "must have the 960 pixels"),
        ((1, 3, 2000, 2000), "has 12000.* bytes, must have at most"),
    ):
        answer_with(wrong)
        with pytest.raises(ProtocolError, match=says):
            client.discretize([picture])
    for turned in ((1, 3, 24, 40), (1, 3, 40, 24)):  # as the EXIF orientation says
        answer_with(turned)
        assert client.discretize([picture]).reconstruction.shape == turned


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("question", ["metadata", "server_metadata"])
def test_an_endless_answer_to_a_question(client: Client, server, question: str, monkeypatch) -> None:
    endless = Endless(b"HTTP/1.1 200 OK\r\n" + CHUNKED, CHUNK)
    monkeypatch.setattr("tests.client.loopback.Handler.do_GET", lambda handler: endless(handler.wfile))
    with pytest.raises(ProtocolError, match="has more than 1048576 bytes"):
        getattr(client, question)()
    assert not client.ready()
    assert not client.live()


LONG = {
    "status line": (b"\0" * 30_000 + b"\r\n\r\n", Unavailable),
    "redirect": (b"HTTP/1.1 302 A\r\nLocation: " + b"x" * 30_000 + b"\r\nContent-Length: 0\r\n\r\n", ProtocolError),
    "error": (b'HTTP/1.1 422 A\r\nContent-Length: 30012\r\n\r\n{"error":"' + b"x" * 30_000 + b'"}', InvalidRequest),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_of_a_server_is_cut(server, images, name: str) -> None:
    answer, kind = LONG[name]
    server.raw = lambda stream, *_: stream.write(answer)
    with Client(server.url, retries=0) as client, pytest.raises(kind) as caught:
        client.discretize(images)
    assert 100 < len(str(caught.value)) < 1500
