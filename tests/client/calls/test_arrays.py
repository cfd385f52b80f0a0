from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dat_client.calls import core
from dat_client.errors import InvalidRequest
from tests.client.calls.discretize_call import call

PNG = b"\x89PNG\r\n\x1a\n...."
JPEG = b"\xff\xd8\xff\xe0...."


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
        ("cat.jpg", r"pass the bytes of the files: .*read_bytes\(\) for path in paths"),
        ([Path("cat.jpg")], r"pass the bytes of the files"),
        ("text", "str"),
        (None, "NoneType"),
        (PNG, r"\[picture\]"),
        ([PNG, b"GIF89a"], r"images\[1\]: got .*GIF89a.*, must be an encoded JPEG, PNG or WebP"),
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


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.int32)])
def test_indices_travel_in_the_smallest_type(largest, dtype):
    encoded_call = core.decode_call(np.full((1, 2, 2), largest, np.int64), None, {})
    assert encoded_call.inputs["indices"].dtype == dtype


@pytest.mark.parametrize(
    "indices", [np.zeros((2, 2), int), np.zeros((1, 2, 2)), np.full((1, 1, 1), -1), np.full((1, 1, 1), 2**31)]
)
def test_bad_indices_are_refused(indices):
    with pytest.raises(InvalidRequest, match="indices"):
        core.decode_call(indices, None, {})
