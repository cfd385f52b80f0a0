"""The uses of a service, on Ray Serve and with --local: discretize, decode, single pictures, tritonclient."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from PIL import Image

from dat_client import AsyncClient, Client, InvalidRequest, TooLarge, Unauthorized, UnknownCodec
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from tests.conftest import crop
from tests.raw_requests import encoded, infer_encoded, infer_images, send


@pytest.fixture(scope="module")
def in_process() -> Discretizer:
    return Discretizer.from_store("tiny-f8", EngineConfig(device="cpu"))


def test_service_gives_what_the_codec_gives(
    client: Client, in_process: Discretizer, photographs: np.ndarray
) -> None:
    q = client.discretize(photographs, outputs=["reconstruction", "indices"])
    expected = in_process.discretize(photographs, outputs=("reconstruction", "indices"))
    assert q.indices is not None
    assert q.reconstruction is not None
    assert (q.indices == expected["indices"]).mean() > 0.999  # other threads, other order of additions
    assert np.abs(q.reconstruction.astype(int) - expected["reconstruction"]).mean() < 0.1
    assert q.codec == "tiny-f8"
    assert q.fingerprint == in_process.fingerprint
    assert np.array_equal(client.decode(q.indices), q.reconstruction)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (240, 320), (301, 225), (225, 301)])
def test_photographs_come_back_in_their_own_size(client: Client, height: int, width: int) -> None:
    images = crop("astronaut", height, width)[None]
    q = client.discretize(images)
    assert q.reconstruction is not None
    assert q.reconstruction.shape == images.shape
    error = np.square(images.astype(float) - q.reconstruction).mean()
    assert 10 * np.log10(255**2 / error) > 18


def test_torch_in_torch_out(client: Client, photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs[:2])
    whole = client.discretize(images)
    assert isinstance(whole.reconstruction, torch.Tensor)
    assert whole.reconstruction.dtype == torch.uint8
    half = client.discretize(images.float() / 255, output_dtype="FP16")
    assert half.reconstruction is not None
    assert half.reconstruction.dtype == torch.float16
    assert (half.reconstruction.float() * 255 - whole.reconstruction.float()).abs().max() < 1


def test_many_at_once_are_not_mixed_up(client: Client) -> None:
    batches = [crop(name, 64, 64 + 8 * i)[None] for i in range(4) for name in ("astronaut", "coffee", "rocket")]
    alone = [client.discretize(x).reconstruction for x in batches]
    futures = [client.submit(x) for x in batches]
    assert all(np.array_equal(f.result().reconstruction, a) for f, a in zip(futures, alone, strict=True))


def test_async_client(url: str, photographs: np.ndarray) -> None:
    async def run() -> list[Any]:
        async with AsyncClient(url, "tiny-f8") as client:
            assert await client.ready()
            return await asyncio.gather(*(client.discretize(x[None, :, :64, :64]) for x in photographs))

    with Client(url, "tiny-f8") as client:
        expected = [client.discretize(x[None, :, :64, :64]).reconstruction for x in photographs]
    for q, e in zip(asyncio.run(run()), expected, strict=True):
        assert np.array_equal(q.reconstruction, e)


def test_tritonclient_unchanged(url: str, client: Client, photographs: np.ndarray) -> None:
    server = triton.InferenceServerClient(url.removeprefix("http://"))
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("tiny-f8")
    assert server.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    model = server.get_model_metadata("tiny-f8")
    assert model["name"] == "tiny-f8"
    assert [i["name"] for i in model["inputs"]] == ["images", "gradients", "gradient_scales", "indices"]
    assert server.get_model_metadata("tiny-f8", model["versions"][0]) == model
    tensor = triton.InferInput("images", list(photographs.shape), "UINT8")
    tensor.set_data_from_numpy(photographs)
    ours = client.discretize(photographs, outputs=["reconstruction", "indices"])
    default = server.infer("tiny-f8", [tensor])
    assert default.as_numpy("reconstruction").tobytes() == ours.reconstruction.tobytes()  # type: ignore[union-attr]
    wanted = [
        triton.InferRequestedOutput(n, binary_data=b) for n, b in (("reconstruction", True), ("indices", False))
    ]
    named = server.infer("tiny-f8", [tensor], outputs=wanted, request_id="7")
    assert named.get_response()["id"] == "7"
    assert np.array_equal(named.as_numpy("indices"), ours.indices)
    assert np.array_equal(named.as_numpy("reconstruction"), ours.reconstruction)
    with pytest.raises(triton.InferenceServerException, match="adversarail"):
        server.infer("tiny-f8", [tensor], outputs=[triton.InferRequestedOutput("adversarail")])


def test_plain_json_without_the_extension(url: str) -> None:
    body = {
        "id": "a",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.5] * 192}],
        "outputs": [{"name": "indices"}, {"name": "reconstruction"}],
    }
    reply = send(url, "POST", "/v2/models/tiny-f8/infer", json.dumps(body), {"Content-Type": "application/json"})
    assert reply.status == 200, reply.body
    answer = json.loads(reply.body)
    assert answer["id"] == "a"
    assert [(o["name"], o["shape"]) for o in answer["outputs"]] == [
        ("indices", [1, 1, 1]),
        ("reconstruction", [1, 3, 8, 8]),
    ]
    assert len(answer["outputs"][1]["data"]) == 192


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_encoded_pictures(client: Client, kind: str) -> None:
    pictures = [encoded(crop(name, 96, 120), kind) for name in ("astronaut", "coffee")]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(p)).convert("RGB")).transpose(2, 0, 1) for p in pictures])
    assert np.array_equal(client.discretize(pictures).reconstruction, client.discretize(decoded).reconstruction)


def test_picture_in_png_out(url: str, client: Client) -> None:
    photograph = crop("chelsea", 225, 301)
    reply = send(url, "POST", "/v1/reconstruct", encoded(photograph, "PNG"))
    assert reply.status == 200
    assert reply.headers["content-type"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(reply.body))).transpose(2, 0, 1)
    assert np.array_equal(picture[None], client.discretize(photograph[None]).reconstruction)


def test_picture_lying_on_its_side_is_put_upright(url: str) -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    Image.fromarray(crop("coffee", 64, 96).transpose(1, 2, 0)).save(out, "JPEG", exif=exif)
    reply = send(url, "POST", "/v1/reconstruct", out.getvalue())
    assert Image.open(io.BytesIO(reply.body)).size == (64, 96)


def test_pages_for_people(url: str) -> None:
    assert b"/v1/reconstruct" in send(url, "GET", "/openapi.json").body
    assert b"SwaggerUIBundle" in send(url, "GET", "/docs").body
    assert b"v1/reconstruct" in send(url, "GET", "/").body
    assert send(url, "GET", "/favicon.ico").headers["content-type"] == "image/svg+xml"


class Links(HTMLParser):
    """Collects all addresses in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_need_no_other_host(url: str, path: str) -> None:
    """All that a page loads comes from the service, and the browser is told to load nothing else."""
    page = send(url, "GET", path)
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    text = page.body.decode()
    assert not re.findall(r"https?://", text)
    links = Links(text).found
    assert {"/": "docs", "/docs": "docs/swagger-ui-bundle.js"}[path] in links
    for link in links:
        reply = send(url, "GET", urljoin(path, link))
        assert reply.status == 200, link
        assert reply.body, link
    if path == "/docs":
        assert 'validatorUrl": null' in text
        assert b"SwaggerUIBundle" in send(url, "GET", "/docs/swagger-ui-bundle.js").body
        assert send(url, "GET", "/docs/redoc.standalone.js").status == 404


def test_what_the_service_refuses_reaches_the_caller_as_the_right_error(client: Client, url: str) -> None:
    with pytest.raises(InvalidRequest, match="strength"):
        client.discretize(np.zeros((1, 3, 8, 8), np.uint8), strength=2)
    with pytest.raises(InvalidRequest, match="16383"):
        client.decode(np.full((1, 2, 2), 20_000, np.uint16))
    with Client(url, "vq-f99") as other, pytest.raises(UnknownCodec, match="tiny-f8"):
        other.discretize(np.zeros((1, 3, 8, 8), np.uint8))
    assert client.discretize(np.zeros((1, 3, 8, 8), np.uint8)).reconstruction is not None


def test_body_over_the_limit_is_an_answer_and_no_broken_pipe(client: Client, serve_app: Callable[..., str]) -> None:
    """The refusal is sent while the body is still arriving, and must reach the client all the same."""
    small = serve_app(codec="identity", max_body_bytes=1 << 20)
    with Client(small, "identity", retries=0) as c:
        for _ in range(5):
            with pytest.raises(TooLarge, match="1048576"):
                c.discretize(np.zeros((64, 3, 224, 224), np.uint8))
    with pytest.raises(TooLarge, match="268435456"):  # through HAProxy as well
        client.discretize(np.zeros((600, 3, 400, 400), np.uint8))


def test_client_sends_its_key(serve_app: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("the-key\n")
    url = serve_app(codec="identity", api_key_file=keys)
    image = np.zeros((1, 3, 8, 8), np.uint8)
    with Client(url, "identity", api_key="the-key") as c:
        assert np.array_equal(c.discretize(image).reconstruction, image)
    with Client(url, "identity", api_key="another") as c, pytest.raises(Unauthorized):
        c.discretize(image)


def test_large_identity_batches_come_back_whole(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity")
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (32, 3, 224, 224), np.uint8) for _ in range(4)]
    with Client(url, "identity") as c, ThreadPoolExecutor(4) as pool:
        for x, q in zip(batches, pool.map(c.discretize, batches), strict=True):
            assert np.array_equal(q.reconstruction, x)


def test_refused_and_good_requests_on_ray(ray_url: str) -> None:
    """Refusals keep their status and message on their way through HAProxy."""
    assert infer_images(ray_url, np.zeros((0, 3, 8, 8), np.uint8), "UINT8", codec="tiny-f8").status == 422
    reply = infer_encoded(ray_url, b"no picture", codec="tiny-f8")
    assert reply.status == 422
    assert reply.error["field"] == "images[0]"
    assert send(ray_url, "GET", "/v2/models/other").status == 404
    assert urlsplit(ray_url).hostname == "127.0.0.1"


def test_operators_see_the_replicas_on_ray(ray_url: str) -> None:
    """Serve adds X-Request-Id itself, so the app must not add it too."""
    reply = send(ray_url, "GET", "/metrics")
    assert reply.status == 200
    assert b'dat_codec_info{codec="tiny-f8"' in reply.body
    replica = json.loads(send(ray_url, "GET", "/v1/status").body)["replica"]
    assert replica != "local"
    assert f'replica="{replica}"'.encode() in reply.body
    connection = http.client.HTTPConnection(urlsplit(ray_url).netloc, timeout=60)
    try:
        connection.request("GET", "/v2", headers={"X-Request-Id": "run-7"})
        answer = connection.getresponse()
        assert answer.headers.get_all("X-Request-Id") == ["run-7"]
        answer.read()
    finally:
        connection.close()
