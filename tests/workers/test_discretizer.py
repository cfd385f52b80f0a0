"""The pure function behind every door."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dat_workers.discretizer
from dat_workers.batching.batcher import Batcher
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import EngineError, InvalidInput
from tests.conftest import crop


@pytest.fixture(scope="module")
def tiny() -> Discretizer:
    return Discretizer.from_store("tiny-f8", EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def identity() -> Discretizer:
    return Discretizer.from_store("identity")


def psnr_db(x: np.ndarray, y: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(x.astype(float) - y).mean()))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (240, 320), (301, 225), (8, 8), (9, 15)])
def test_pictures_keep_their_size(tiny: Discretizer, height: int, width: int) -> None:
    images = crop("astronaut", height, width)[None]
    q = tiny.discretize(images, outputs=("reconstruction", "indices"))
    assert q["reconstruction"].shape == images.shape
    assert q["reconstruction"].dtype == np.uint8
    assert q["indices"].shape == (1, -(-height // 8), -(-width // 8))
    assert q["indices"].dtype == np.uint16


def test_reconstruction_resembles_the_photographs(tiny: Discretizer, photographs: np.ndarray) -> None:
    q = tiny.discretize(photographs)["reconstruction"]
    assert psnr_db(photographs, q) > 20
    assert psnr_db(photographs, q[::-1]) < 15  # in the order they came


def test_padding_is_the_reflection_cropped_away(tiny: Discretizer) -> None:
    odd = crop("chelsea", 61, 50)[None]
    padded = np.pad(odd, ((0, 0), (0, 0), (0, 3), (0, 6)), mode="reflect")
    whole = tiny.discretize(padded, outputs=("reconstruction", "indices"))
    part = tiny.discretize(odd, outputs=("reconstruction", "indices"))
    assert np.array_equal(part["indices"], whole["indices"])
    assert np.array_equal(part["reconstruction"], whole["reconstruction"][:, :, :61, :50])


def test_decoding_the_tokens_gives_the_reconstruction(tiny: Discretizer, photographs: np.ndarray) -> None:
    q = tiny.discretize(photographs, outputs=("reconstruction", "indices"))
    assert np.array_equal(tiny.decode(q["indices"]), q["reconstruction"])
    assert np.array_equal(tiny.decode(q["indices"].astype(np.int32)), q["reconstruction"])


def test_answer_does_not_depend_on_company(tiny: Discretizer) -> None:
    """Each of 20 images alone gives the bits it gives among the others."""
    images = np.concatenate([crop(n, 64, 128)[None] for n in ("astronaut", "coffee", "rocket", "chelsea")] * 5)
    together = tiny.discretize(images, output_dtype="FP32")["reconstruction"]
    alone = np.concatenate([tiny.discretize(x[None], output_dtype="FP32")["reconstruction"] for x in images])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "FP16"), (np.float32, "FP32")])
def test_floats_are_the_same_images(tiny: Discretizer, photographs: np.ndarray, dtype: Any, name: str) -> None:
    as_uint8 = tiny.discretize(photographs[:1], output_dtype=name)["reconstruction"]
    as_float = tiny.discretize((photographs[:1] / 255).astype(dtype))["reconstruction"]
    assert as_uint8.dtype == as_float.dtype == dtype
    assert as_float.min() >= 0
    assert as_float.max() <= 1
    # fp16 pixels are not the uint8 ones exactly, and a few tokens differ for it
    assert np.abs(as_uint8.astype(np.float32) - as_float).mean() < (1e-6 if dtype == np.float32 else 2e-3)
    rounded = tiny.discretize(photographs[:1])["reconstruction"]
    assert np.abs(rounded - as_uint8.astype(np.float64) * 255).max() <= (0.501 if dtype == np.float32 else 0.6)


@given(
    st.sampled_from([np.uint8, np.float16, np.float32]),
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, "UINT8", "FP16", "FP32"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_identity_copies(dtype: Any, n: int, height: int, width: int, output: str | None) -> None:
    discretizer = Discretizer.from_store("identity")
    levels = np.random.default_rng(n).integers(0, 256, (n, 3, height, width), np.uint8)
    images = levels if dtype == np.uint8 else (levels / 255).astype(dtype)
    copy = discretizer.discretize(images, output_dtype=output)["reconstruction"]
    expected = {None: np.dtype(dtype), "UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}[output]
    assert copy.dtype == expected
    back = copy if copy.dtype == np.uint8 else np.round(copy.astype(np.float64) * 255)
    assert np.array_equal(back, levels)


def test_identity_returns_images_of_the_wanted_dtype_without_a_copy(identity: Discretizer) -> None:
    images = np.zeros((2, 3, 9, 15), np.uint8)
    assert identity.discretize(images)["reconstruction"] is images
    request = identity.prepare(images)
    assert request.result is not None
    assert Batcher().submit(request).result(0).outputs["reconstruction"] is images  # no codec has been started


def test_identity_spends_no_pass_on_checks_of_its_images(
    identity: Discretizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dat_workers.discretizer, "record_finite", None)
    images = np.array([-0.0, 0.5, 1.0], np.float32).reshape(1, 3, 1, 1)
    outputs = identity.discretize(images, np.zeros_like(images))
    assert outputs["reconstruction"].tobytes() == images.tobytes()
    assert np.array_equal(outputs["adversarial"], images)


def test_identity_describes_itself_as_no_engine(identity: Discretizer) -> None:
    assert identity.engine.describe() == {"engine": "none", "device": "cpu", "dtype": "none", "tricks": "none"}


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((1, 3, 64, 64)), "float64"),
        (np.zeros((0, 3, 64, 64), np.uint8), r"\[0, 3, 64, 64\]"),
        (np.zeros((3, 64, 64), np.uint8), r"\[3, 64, 64\]"),
        (np.zeros((1, 1, 64, 64), np.uint8), r"\[1, 1, 64, 64\]"),
        (np.zeros((1, 3, 7, 64), np.uint8), "7x64"),
        (np.full((1, 3, 64, 64), np.nan, np.float32), "nan"),
        (np.full((1, 3, 64, 64), 255, np.float32), "255"),
    ],
)
def test_images_that_are_none(tiny: Discretizer, images: np.ndarray, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        tiny.discretize(images)
    assert caught.value.field == "images"


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        (np.full((1, 2, 2), 16384, np.uint16), "16384"),
        (np.full((1, 2, 2), -1, np.int32), "-1"),
        (np.zeros((1, 2, 2), np.int64), "int64"),
        (np.zeros((2, 2), np.uint16), r"\[2, 2\]"),
        (np.zeros((0, 2, 2), np.uint16), r"\[0, 2, 2\]"),
    ],
)
def test_tokens_that_are_none(tiny: Discretizer, indices: np.ndarray, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        tiny.decode(indices)


def test_what_a_codec_lacks_is_refused(tiny: Discretizer, identity: Discretizer) -> None:
    image = np.zeros((1, 3, 8, 8), np.uint8)
    with pytest.raises(InvalidInput, match="adversarial"):
        tiny.discretize(image, outputs=("adversarial",))
    with pytest.raises(InvalidInput, match="indices"):
        identity.discretize(image, outputs=("indices",))
    with pytest.raises(InvalidInput, match="identity"):
        identity.decode(np.zeros((1, 1, 1), np.uint16))


@pytest.mark.parametrize(("half", "says"), [("decoder", r"images \[0\].*not finite"), ("encoder", "latent")])
def test_overflow_is_an_error_and_never_a_picture(half: str, says: str) -> None:
    broken = Discretizer.from_store("tiny-f8", EngineConfig("torch", device="cpu"))
    assert broken.engine is not None
    getattr(broken.engine.model, half).conv_out.weight[0, 0, 0, 0] = torch.inf  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=says):
        broken.discretize(np.zeros((2, 3, 16, 16), np.uint8))


def test_large_pictures_take_the_blockwise_attention_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from dat_workers.codecs.networks import vqgan

    tiny = Discretizer.from_store("tiny-f8", EngineConfig(device="cpu"))
    image = crop("coffee", 128, 128)[None]
    whole = tiny.discretize(image, outputs=("indices",))["indices"]
    monkeypatch.setattr(vqgan, "LARGE_ATTENTION", 16)
    assert (tiny.discretize(image, outputs=("indices",))["indices"] == whole).mean() > 0.98
