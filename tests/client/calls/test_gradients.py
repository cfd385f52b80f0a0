"""Gradients on the wire: FP16 and INT8 with a scale for each sample, encoded pictures beside them."""

from __future__ import annotations

import numpy as np
import pytest

from dat_client import InvalidRequest
from dat_client.calls.gradients import gradient_tensors


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-9, 1.0, 3e4, 1e20, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("torch", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_arrives_is_what_was_meant(largest: float, dtype: type, torch: bool) -> None:
    if dtype is np.float16 and largest > 6e4:
        largest = 6e4
    g = (np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4)) * largest).astype(dtype)
    g[0, 0, 0, 0], g[1, 2, 3, 3] = largest, -largest
    gradients = pytest.importorskip("torch").from_numpy(g) if torch else g
    sent = gradient_tensors(gradients, g.shape)
    assert sent["gradients"].dtype == np.float16
    back = sent["gradient_scales"][:, None, None, None] * sent["gradients"].astype(np.float32)
    assert np.isfinite(back).all()
    exact = g.astype(np.float64)
    assert np.abs(back - exact).max() <= 6e-4 * np.abs(exact).max() + 1e-44
    assert (np.sign(back) == np.sign(exact))[np.abs(exact) > 1e-6 * largest + 1e-44].all()


def test_each_sample_has_its_own_scale() -> None:
    g = np.stack([np.full((3, 4, 4), 1e-9, np.float32), np.full((3, 4, 4), 1e3, np.float32)])
    sent = gradient_tensors(g, g.shape)
    back = sent["gradient_scales"][:, None, None, None] * sent["gradients"].astype(np.float32)
    assert np.allclose(back, g, rtol=6e-4)


def test_bfloat16_is_taken() -> None:
    torch = pytest.importorskip("torch")
    sent = gradient_tensors(torch.full((1, 3, 2, 2), 0.5, dtype=torch.bfloat16), (1, 3, 2, 2), "FP32")
    assert np.array_equal(sent["gradients"], np.full((1, 3, 2, 2), 0.5, np.float32))


@pytest.mark.parametrize(
    ("gradients", "says"),
    [
        (np.zeros((1, 3, 4, 4)), "float64"),
        (np.zeros((1, 3, 4, 5), np.float32), "shape"),
        (np.full((1, 3, 4, 4), np.nan, np.float32), "sample 0"),
        ([1.0], "numpy"),
    ],
)
def test_what_is_none_is_refused(gradients: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        gradient_tensors(gradients, (1, 3, 4, 4))
    if isinstance(gradients, np.ndarray):
        with pytest.raises(InvalidRequest, match=says):
            gradient_tensors(pytest.importorskip("torch").from_numpy(gradients), (1, 3, 4, 4))


def test_gradients_go_with_encoded_images(client, server):
    images = np.zeros((3, 3, 32, 48), np.uint8)
    files = [b"\xff\xd8\xff"] * 3
    server.change = lambda answer: {**answer, "outputs": dict.fromkeys(("reconstruction", "adversarial"), images)}
    client.discretize(files, np.ones(images.shape, np.float32), gradient_dtype="INT8")
    inputs = server.requests[0].inputs
    assert (inputs["images"].dtype, inputs["gradients"].dtype) == (object, np.int8)
    assert inputs["gradients"].shape == images.shape
    with pytest.raises(InvalidRequest, match=r"gradients: got shape \[3, 3, 8, 8\]"):
        client.discretize(images, np.ones((3, 3, 8, 8), np.float32))


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-9, 1.0, 3e4, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("torch", [False, True], ids=["numpy", "torch"])
def test_int8_gradients_are_within_half_a_step(largest, torch):
    g = (np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4)) * largest).astype(np.float32)
    g[0, 0, 0, 0], g[1, 2, 3, 3] = largest, -largest
    gradients = pytest.importorskip("torch").from_numpy(g) if torch else g
    sent = gradient_tensors(gradients, g.shape, "INT8")
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
    by_numpy, by_torch = (
        gradient_tensors(g, g.shape, "INT8"),
        gradient_tensors(torch.from_numpy(g), g.shape, "INT8"),
    )
    assert all(np.array_equal(by_numpy[name], by_torch[name]) for name in by_numpy)
