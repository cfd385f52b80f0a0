"""Thin links: images as JPEG, gradients as INT8."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from dat_client import InvalidRequest
from dat_client._arrays import gradient_tensors
from dat_client._jpeg import encoded


def smooth(count: int = 3) -> np.ndarray:
    y, x = np.mgrid[0:32, 0:48]
    planes = np.stack([4 * y + 20, 3 * x + 9, 2 * y + 2 * x])
    return np.stack([(planes + 5 * n).astype(np.uint8) for n in range(count)])


@pytest.mark.parametrize("torch", [False, True], ids=["numpy", "torch"])
def test_images_travel_as_jpeg_and_come_back_as_they_were_given(client, server, torch):
    image = pytest.importorskip("PIL.Image")
    images = smooth()
    given = pytest.importorskip("torch").from_numpy(images) if torch else images
    server.change = lambda answer: {**answer, "outputs": {"reconstruction": images}}
    q = client.discretize(given, jpeg_quality=95)
    assert type(q.reconstruction) is type(given)
    sent = server.requests[0].inputs["images"]
    assert (sent.dtype, sent.shape) == (object, (3,))
    for file, original in zip(sent, images, strict=True):
        decoded = np.asarray(image.open(io.BytesIO(file))).transpose(2, 0, 1)
        assert np.abs(decoded.astype(int) - original).mean() < 2
    assert sum(map(len, sent)) < images.nbytes / 2


def test_gradients_go_with_jpeg_images(client, server):
    images = smooth()
    server.change = lambda answer: {**answer, "outputs": dict.fromkeys(("reconstruction", "adversarial"), images)}
    client.discretize(images, np.ones(images.shape, np.float32), jpeg_quality=90, gradient_dtype="INT8")
    inputs = server.requests[0].inputs
    assert (inputs["gradients"].dtype, inputs["gradients"].shape) == (np.int8, images.shape)
    with pytest.raises(InvalidRequest, match="gradients: shape"):
        client.discretize(images, np.ones((3, 3, 8, 8), np.float32), jpeg_quality=90)


@pytest.mark.parametrize("quality", [0, 101, 9.5, True, "95"])
def test_a_wrong_quality_is_refused(client, quality):
    with pytest.raises(InvalidRequest, match="jpeg_quality: must be an integer from 1 to 100"):
        client.discretize(smooth(), jpeg_quality=quality)


@pytest.mark.parametrize("images", [np.zeros((1, 3, 8, 8), np.float32), [b"\xff\xd8\xff"]])
def test_only_uint8_images_become_jpeg(client, images):
    with pytest.raises(InvalidRequest, match="uint8"):
        client.discretize(images, jpeg_quality=95)


def test_without_pillow_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'dat-client\[jpeg\]'"):
        encoded(smooth(), 95)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-9, 1.0, 3e4, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("torch", [False, True], ids=["numpy", "torch"])
def test_int8_gradients_are_within_half_a_step(largest, torch):
    g = (np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4)) * largest).astype(np.float32)
    g[0, 0, 0, 0], g[1, 2, 3, 3] = largest, -largest
    given = pytest.importorskip("torch").from_numpy(g) if torch else g
    sent = gradient_tensors(given, g.shape, "INT8")
    assert sent["gradients"].dtype == np.int8
    assert sent["gradients"].min() >= -127
    assert (sent["gradient_scales"] > 0).all()
    back = sent["gradient_scales"].astype(np.float64)[:, None, None, None] * sent["gradients"]
    assert np.abs(back - g).max() <= max(largest / 127 * 0.5001, np.finfo(np.float32).tiny)
    if largest > 1e-35:
        assert sent["gradients"][0, 0, 0, 0] == 127
        assert sent["gradients"][1, 2, 3, 3] == -127


def test_numpy_and_torch_make_the_same_int8_gradients():
    torch = pytest.importorskip("torch")
    g = np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)
    one, other = gradient_tensors(g, g.shape, "INT8"), gradient_tensors(torch.from_numpy(g), g.shape, "INT8")
    assert all(np.array_equal(one[name], other[name]) for name in one)
