"""Gradients that travel as INT8, for thin links; encoded pictures beside them."""

from __future__ import annotations

import numpy as np
import pytest

from dat_client import InvalidRequest
from dat_client.calls.arrays import gradient_tensors


def test_gradients_go_with_encoded_images(client, server):
    images = np.zeros((3, 3, 32, 48), np.uint8)
    files = [b"\xff\xd8\xff"] * 3
    server.change = lambda answer: {**answer, "outputs": dict.fromkeys(("reconstruction", "adversarial"), images)}
    client.discretize(files, np.ones(images.shape, np.float32), gradient_dtype="INT8")
    inputs = server.requests[0].inputs
    assert (inputs["images"].dtype, inputs["gradients"].dtype) == (object, np.int8)
    assert inputs["gradients"].shape == images.shape
    with pytest.raises(InvalidRequest, match="gradients: shape"):
        client.discretize(images, np.ones((3, 3, 8, 8), np.float32))


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
