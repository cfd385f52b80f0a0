from __future__ import annotations

import numpy as np
import pytest

from dat_client import Discretized
from dat_client.calls import core
from dat_client.errors import (
    InvalidRequest,
    Overloaded,
    ProtocolError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownCodec,
    WireError,
)
from dat_client.transports import retry
from dat_client.wire import encode_error

PNG = b"\x89PNG\r\n\x1a\n...."
JPEG = b"\xff\xd8\xff\xe0...."


def call(images, **kwargs):
    return core.discretize_call(
        images,
        kwargs.pop("gradients", None),
        kwargs.pop("gradient_dtype", "FP16"),
        kwargs.pop("outputs", None),
        kwargs.pop("output_dtype", None),
        kwargs,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, ">f4"])
def test_good_images_are_taken_as_they_are(dtype):
    images = np.ones((2, 3, 4, 5), dtype)
    assert call(images).inputs["images"] is images


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_borders_of_0_1_are_inside(dtype):
    images = np.array([0.0, -0.0, 1.0], dtype).reshape(1, 3, 1, 1)
    assert call(images).batch == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 4, 4), np.float64), "float64"),
        (np.zeros((1, 3, 4, 4), np.int32), "int32"),
        (np.zeros((3, 4, 4), np.uint8), r"images\[None\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "channels last"),
        (np.zeros((2, 1, 4, 4), np.uint8), "shape"),
        (np.zeros((0, 3, 4, 4), np.uint8), "shape"),
        (np.zeros((2, 3, 0, 4), np.uint8), "shape"),
        (np.zeros((4, 4), np.uint8), "shape"),
        ([np.zeros((3, 4, 4), np.uint8)], "np.stack"),
        ([], "np.stack"),
        ("text", "str"),
        (None, "NoneType"),
        (PNG, r"\[picture\]"),
        ([PNG, b"GIF89a"], r"images\[1\]: no JPEG, PNG or WebP.*GIF89a"),
        ([PNG, 7], r"images\[1\].*int"),
    ],
)
def test_bad_images_are_refused_before_sending(images, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        call(images)
    assert caught.value.field.startswith("images")
    assert caught.value.status is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [-1e-3, 1.001, 255, np.nan, np.inf, -np.inf])
def test_floats_outside_0_1_are_refused(dtype, value):
    images = np.full((1, 3, 2, 2), 0.5, dtype)
    images[0, 1, 1, 0] = value
    with pytest.raises(InvalidRequest, match="values from"):
        call(images)


@pytest.mark.parametrize(
    "pictures", [[PNG, JPEG], (bytearray(PNG), memoryview(JPEG)), np.array([PNG, JPEG], object)]
)
def test_encoded_pictures_become_a_bytes_tensor(pictures):
    tensor = call(pictures).inputs["images"]
    assert tensor.tolist() == [PNG, JPEG]
    assert tensor.dtype == object


@pytest.mark.parametrize("outputs", [["colour"], [], ["indices", "indices"], "colour"])
def test_bad_outputs_are_refused(images, outputs):
    with pytest.raises(InvalidRequest, match="outputs") as caught:
        call(images, outputs=outputs)
    assert caught.value.field == "outputs"


def test_parameters_are_plain_numbers_and_none_is_left_out(images):
    made = call(images, alpha=np.float32(0.5), seed=None, preset="paper", output_dtype="FP16")
    assert made.parameters == {"alpha": 0.5, "preset": "paper", "output_dtype": "FP16"}
    assert call(images).parameters == {}


@pytest.mark.parametrize("bad", [{"alpha": float("nan")}, {"seed": [1]}, {"output_dtype": "INT8"}])
def test_bad_parameters_are_refused_by_name(images, bad):
    with pytest.raises(InvalidRequest) as caught:
        call(images, **bad)
    assert caught.value.field == next(iter(bad))


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.int32)])
def test_indices_travel_in_the_smallest_type(largest, dtype):
    made = core.decode_call(np.full((1, 2, 2), largest, np.int64), None, {})
    assert made.inputs["indices"].dtype == dtype


@pytest.mark.parametrize(
    "indices", [np.zeros((2, 2), int), np.zeros((1, 2, 2)), np.full((1, 1, 1), -1), np.full((1, 1, 1), 2**31)]
)
def test_bad_indices_are_refused(indices):
    with pytest.raises(InvalidRequest, match="indices"):
        core.decode_call(indices, None, {})


def test_ids_are_never_given_twice(images):
    assert len({call(images).id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (400, {}, InvalidRequest),
        (401, {}, Unauthorized),
        (403, {}, Unauthorized),
        (404, {}, UnknownCodec),
        (408, {}, Unavailable),
        (413, {}, TooLarge),
        (422, {}, InvalidRequest),
        (429, {}, Overloaded),
        (500, {}, Unavailable),
        (502, {}, Unavailable),
        (503, {}, Unavailable),
        (503, {"retry-after": "2"}, Overloaded),
        (504, {}, Unavailable),
        (301, {"location": "http://other/"}, ProtocolError),
    ],
)
def test_statuses_become_exceptions(status, headers, kind):
    body = bytearray(encode_error("too hot", "images", 7, 5))
    error = core.error_of(core.Reply(status, headers, body), "http://x/infer")
    assert type(error) is kind
    assert "http://x/infer" in str(error)
    assert kind is ProtocolError or "too hot" in str(error)
    if isinstance(error, InvalidRequest):
        assert (error.field, error.value, error.limit, error.status) == ("images", 7, 5, status)
    if isinstance(error, Overloaded):
        assert error.retry_after_s == (2.0 if headers else None)


def test_answers_that_are_not_the_protocols():
    assert core.error_of(core.Reply(204, {}, bytearray()), "u") is None
    page = bytearray(b"<html>" * 1000)
    assert type(core.error_of(core.Reply(404, {}, page), "u")) is ProtocolError
    too_large = core.error_of(core.Reply(413, {}, page), "u")
    assert type(too_large) is TooLarge
    assert len(str(too_large)) < 200


class Time:
    """A clock that moves only when it is waited for, and a jitter that takes the longest pause."""

    def __init__(self, attempt_s: float = 0.0, stop: bool = False) -> None:
        self.now, self.attempt_s, self.stop = 100.0, attempt_s, stop
        self.waits: list[float] = []
        self.attempts = 0

    def run(self, results, *, timeout_s=60.0, retries=8):
        left = iter(results)

        def attempt(deadline: float, number: int) -> str:
            self.attempts += 1
            assert (deadline, number) == (100 + timeout_s, self.attempts)
            self.now += self.attempt_s
            result = next(left)
            if isinstance(result, Exception):
                raise result
            return result

        def wait(seconds: float) -> bool:
            self.waits.append(seconds)
            self.now += seconds
            return self.stop

        return retry.repeat(
            attempt, what="POST u", timeout_s=timeout_s, deadline=100 + timeout_s, retries=retries,
            clock=lambda: self.now, wait=wait, jitter=lambda low, high: high,
        )  # fmt: skip


@pytest.fixture
def real_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 5.0)


@pytest.mark.usefixtures("real_pauses")
def test_pauses_grow_to_a_limit_then_it_gives_up():
    time = Time()
    lost = ConnectionResetError("reset")
    error = Unavailable("u: reset", cause="ConnectionResetError: reset")
    error.__cause__ = lost
    with pytest.raises(Unavailable, match=r"retries=8, 9 attempts .*last: ConnectionResetError: reset") as caught:
        time.run([error] * 9)
    assert time.waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert caught.value.attempts == 9
    assert caught.value.__cause__ is lost
    assert caught.value.cause == "ConnectionResetError: reset"


def test_it_stops_at_the_first_good_answer():
    time = Time()
    assert time.run([Unavailable("a"), Overloaded("b", retry_after_s=3), "good"]) == "good"
    assert time.attempts == 3
    assert time.waits[1] >= 3


def test_what_is_wrong_is_not_repeated():
    for error in (InvalidRequest("m"), Unauthorized("m"), ProtocolError("m"), WireError("m")):
        time = Time()
        with pytest.raises(type(error)):
            time.run([error, "good"])
        assert time.attempts == 1


def test_retry_after_beyond_the_timeout_is_overloaded_at_once():
    time = Time()
    with pytest.raises(Overloaded, match=r"1 attempt .*last: full") as caught:
        time.run([Overloaded("full", retry_after_s=100), "good"])
    assert time.waits == []
    assert caught.value.retry_after_s == 100


def test_timeout_is_named_when_it_is_eaten():
    with pytest.raises(Unavailable, match=r"timed out after timeout_s=2\b") as caught:
        Time(attempt_s=2.5).run([Unavailable("slow"), "good"], timeout_s=2.0)
    assert caught.value.attempts == 1


def test_closing_ends_the_repeats():
    with pytest.raises(Unavailable, match="closed"):
        Time(stop=True).run([Unavailable("a"), "good"])


def test_repr_shows_shapes_rather_than_data():
    q = Discretized(np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 1, 1), np.uint16), codec="c", fingerprint="f")
    assert (
        repr(q) == "Discretized(reconstruction=uint8[2, 3, 8, 8], indices=uint16[2, 1, 1], "
        "codec='c', fingerprint='f')"
    )
