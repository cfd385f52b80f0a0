"""Each kind of bad request gets its status and a message with field, value and limit; the next request works."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.conftest import crop
from tests.e2e.refusals import GOOD, LIMITS, identity, next_request_works, refused
from tests.raw_requests import (
    Reply,
    encoded,
    infer,
    infer_encoded,
    infer_images,
    jpeg_bomb,
    png_bomb,
    send,
    tensor,
)

__all__ = ["identity", "next_request_works"]


ENTRY, DATA = tensor("images", GOOD, "UINT8")


def test_body_that_is_not_json(identity: str) -> None:
    reply = infer(identity, b"{not json", length=9)
    assert reply.status == 400
    assert "JSON" in reply.error["error"]


@pytest.mark.parametrize("length", ["100000000", "-5", "twelve", "", "1e3", "9" * 40, "9" * 5000, "\xb2"])
def test_header_length_that_cannot_be(identity: str, length: str) -> None:
    reply = infer(identity, {"inputs": [ENTRY]}, DATA, length=length)
    assert reply.status == 400
    assert reply.error["field"] == "Inference-Header-Content-Length"


@pytest.mark.parametrize("off", [-1, 1, 100])
def test_header_length_that_lies(identity: str, off: int) -> None:
    text = json.dumps({"inputs": [ENTRY]}).encode()
    assert infer(identity, text, DATA, length=len(text) + off).status == 400


def test_tensor_shorter_than_it_says(identity: str) -> None:
    refused(infer(identity, {"inputs": [ENTRY]}, DATA[:-1]), 400, "images", str(len(DATA)), str(len(DATA) - 1))


def test_bytes_that_belong_to_nothing(identity: str) -> None:
    assert infer(identity, {"inputs": [ENTRY]}, DATA + b"more").status == 400


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.01])
@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "FP32"), (np.float16, "FP16")])
def test_float_image_that_is_not_within_0_and_1(identity: str, bad: float, dtype: Any, name: str) -> None:
    images = np.full((1, 3, 8, 8), 0.5, dtype)
    images[0, 1, 2, 3] = bad
    refused(infer_images(identity, images, name), 422, "images", "range", "0..1")


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (3, 8, 8), (1, 4, 8, 8), (3,), ()])
def test_shape_that_is_no_batch_of_images(identity: str, shape: tuple[int, ...]) -> None:
    refused(infer_images(identity, np.zeros(shape, np.uint8), "UINT8"), 422, "images", "", "")


@pytest.mark.parametrize(("dtype", "name"), [(np.float64, "FP64"), (np.int64, "INT64"), (np.bool_, "BOOL")])
def test_dtype_that_is_not_taken(identity: str, dtype: Any, name: str) -> None:
    reply = infer_images(identity, np.zeros((1, 3, 8, 8), dtype), name)
    refused(reply, 422, "images", np.dtype(dtype).name, "UINT8, FP16 or FP32")


def test_datatype_that_does_not_exist(identity: str) -> None:
    refused(infer(identity, {"inputs": [ENTRY | {"datatype": "FP12"}]}, DATA), 422, "images", "FP12", "")


def test_shape_that_does_not_match_the_data(identity: str) -> None:
    reply = infer(identity, {"inputs": [ENTRY | {"shape": [4, 3, 8, 8]}]}, DATA)
    assert reply.status in (400, 422)
    assert reply.error["field"] == "images"


def test_more_images_than_taken(identity: str) -> None:
    refused(infer_images(identity, np.zeros((17, 3, 8, 8), np.uint8), "UINT8"), 413, "images", "17", "16")


def test_ten_thousand_by_ten_thousand_claimed_without_bytes(identity: str) -> None:
    entry = ENTRY | {"shape": [1, 3, 10_000, 10_000], "parameters": {"binary_data_size": 300_000_000}}
    refused(infer(identity, {"inputs": [entry]}, DATA), 400, "images", "300000000", str(len(DATA)))


def test_ten_thousand_by_ten_thousand_announced(identity: str) -> None:
    """The announced length suffices for the refusal: none of the 300 MB is read."""
    parts = urlsplit(identity)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as s:
        s.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 300000200\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += s.recv(4000)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"300000200" in answer
    assert str(LIMITS["max_body_bytes"]).encode() in answer


def test_one_image_with_too_many_pixels(identity: str) -> None:
    images = np.zeros((1, 3, 1200, 900), np.uint8)
    refused(infer_images(identity, images, "UINT8"), 413, "images", "1080000 pixels", "1000000")


def test_many_images_with_too_many_pixels_together(identity: str) -> None:
    images = np.zeros((3, 3, 900, 800), np.uint8)
    refused(infer_images(identity, images, "UINT8"), 413, "images", "2160000 pixels", "2000000")


@pytest.mark.parametrize(
    "bomb", [png_bomb(10_000), jpeg_bomb(10_000), jpeg_bomb(65_000)], ids=["png", "jpeg", "huge"]
)
def test_picture_bomb(identity: str, bomb: bytes) -> None:
    refused(infer_encoded(identity, bomb), 413, "images[0]", "pixels", "1000000")


@pytest.mark.parametrize("bomb", [png_bomb(10_000), jpeg_bomb(10_000)], ids=["png", "jpeg"])
def test_picture_bomb_for_people(identity: str, bomb: bytes) -> None:
    refused(send(identity, "POST", "/v1/reconstruct", bomb), 413, "body", "pixels", "1000000")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_picture(identity: str, kind: str) -> None:
    whole = encoded(crop("astronaut", 64, 64), kind)
    refused(infer_encoded(identity, whole, whole[: len(whole) // 2]), 422, "images[1]", "", "picture")


@pytest.mark.parametrize("junk", [b"", b"GIF89a" + bytes(100), b"\xff\xd8\xff" + bytes(1000)])
def test_bytes_that_are_no_picture(identity: str, junk: bytes) -> None:
    refused(infer_encoded(identity, junk), 422, "images[0]", "", "JPEG, PNG or WebP")
    refused(send(identity, "POST", "/v1/reconstruct", junk), 422, "body", "", "JPEG, PNG or WebP")


def test_pictures_of_different_sizes(identity: str) -> None:
    pictures = [encoded(crop("coffee", side, 64), "PNG") for side in (64, 72)]
    refused(infer_encoded(identity, *pictures), 422, "images[1]", "64x72", "64x64")


def test_no_pictures(identity: str) -> None:
    refused(infer_encoded(identity), 422, "images", "[0]", "1 or more")


def test_output_that_does_not_exist(identity: str) -> None:
    reply = infer_images(identity, GOOD, "UINT8", outputs=[{"name": "reconstructoin"}])
    refused(reply, 422, "outputs", "reconstructoin", "reconstruction")


def test_output_that_this_codec_lacks(identity: str) -> None:
    reply = infer_images(identity, GOOD, "UINT8", outputs=[{"name": "indices"}])
    refused(reply, 422, "outputs", "indices", "reconstruction")


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"strength": 0.1}, "parameters"),
        ({"output_dtype": "FP8"}, "output_dtype"),
        ({"output_dtype": 3}, "output_dtype"),
        ({"alpha": -0.1, "replace_fraction": 0.5}, "alpha"),
        ({"alpha": 0.1}, "alpha"),
        ({"alpha": 0.1, "replace_fraction": 0}, "alpha"),
        ({"normalize": "l2", "epsilon": 0.1, "preset": "paper"}, "normalize, epsilon"),
        ({"base": "x"}, "base"),
    ],
)
def test_parameter_that_is_not_usable(identity: str, parameters: dict[str, Any], field: str) -> None:
    refused(infer_images(identity, GOOD, "UINT8", parameters=parameters), 422, field, "", "")


def test_preset_alone_is_taken(identity: str) -> None:
    for parameters in ({"preset": "paper"}, {"preset": "easyrobust", "epsilon": None, "seed": 3}):
        assert infer_images(identity, GOOD, "UINT8", parameters=parameters).status == 200


def test_null_is_shown_as_null(identity: str) -> None:
    reply = infer_images(identity, GOOD, "UINT8", parameters={"alpha": None})
    assert reply.status == 422
    assert reply.error["error"] == "alpha: null is not usable; expected a finite number, 0 or more, at most 1e38"
    assert reply.error["value"] is None


@pytest.mark.parametrize("where", ["top", "parameters", "tensor"])
def test_key_that_occurs_twice(identity: str, where: str) -> None:
    text = json.dumps({"inputs": [ENTRY], "parameters": {"seed": 1}})
    key = {"top": '"parameters"', "parameters": '"seed"', "tensor": '"name"'}[where]
    twice = {"top": '"parameters": {}, ', "parameters": '"seed": 2, ', "tensor": '"name": "x", '}[where]
    reply = infer(identity, text.replace(key, twice + key, 1).encode(), DATA)
    assert reply.status == 400
    assert "a key of the JSON occurs twice in one object" in reply.error["error"]
    assert reply.error["value"] == key.strip('"')


@pytest.mark.parametrize("names", [["pictures"], ["images", "indices"], []])
def test_inputs_that_are_not_the_right_ones(identity: str, names: list[str]) -> None:
    parts = [tensor(name, GOOD, "UINT8") for name in names]
    reply = infer(identity, {"inputs": [entry for entry, _ in parts]}, b"".join(data for _, data in parts))
    refused(reply, 422, "inputs", "", "images")


def test_tokens_for_a_codec_without_any(identity: str) -> None:
    entry, data = tensor("indices", np.zeros((1, 2, 2), np.uint16), "UINT16")
    refused(infer(identity, {"inputs": [entry]}, data), 422, "indices", "identity", "codebook")


def test_json_deeper_than_any_tensor(identity: str) -> None:
    assert infer(identity, b'{"inputs":' + b"[" * 100_000, length=100_010).status == 400


def test_json_answer_larger_than_taken(identity: str) -> None:
    reply = infer_images(identity, np.zeros((1, 3, 600, 600), np.uint8), "UINT8")
    refused(reply, 413, "outputs", "reconstruction as JSON", "binary_data_output")
    assert infer_images(identity, np.zeros((1, 3, 60, 60), np.uint8), "UINT8").status == 200


def test_more_encoded_pictures_than_taken(identity: str) -> None:
    refused(infer_encoded(identity, *[b""] * 17), 422, "images", "17", "16")


def test_sixteen_bit_grey_becomes_its_high_byte_and_types_beyond_three_are_refused(identity: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    (answer,) = json.loads(infer_encoded(identity, out.getvalue()).body)["outputs"]
    assert np.array_equal(np.reshape(answer["data"], (3, 8, 8)), [values >> 8] * 3)
    for kind in ("TIFF", "BMP", "PPM"):
        out = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(out, kind)
        refused(infer_encoded(identity, out.getvalue()), 422, "images[0]", "bytes", "a whole JPEG, PNG or WebP")


def test_json_larger_than_taken(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec="identity", max_json_bytes=2000)
    numbers = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 20, 20], "data": [0] * 1200}
    reply = send(url, "POST", "/v2/models/identity/infer", json.dumps({"inputs": [numbers]}))
    refused(reply, 413, "JSON part", "bytes", "2000")


def test_bad_requests_do_not_disturb_good_ones(identity: str) -> None:
    wrong: list[Reply] = []

    def bad() -> None:
        wrong.extend(infer(identity, {"inputs": [ENTRY]}, DATA[:-7]) for _ in range(20))

    threads = [threading.Thread(target=bad) for _ in range(3)]
    for t in threads:
        t.start()
    for _ in range(30):
        reply = infer_images(identity, GOOD, "UINT8", parameters={"binary_data_output": True})
        assert reply.status == 200
        assert reply.body.endswith(GOOD.tobytes())
    for t in threads:
        t.join()
    assert {r.status for r in wrong} == {400}
