"""Q(x + δ) over the wire, compared with a direct implementation of Algorithm 1 with the published modules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_client import Client, InvalidRequest, wire
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.store import load_model
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from tests.conftest import app_in_thread, crop
from tests.raw_requests import send

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def codec() -> Iterator[Client]:
    with app_in_thread(codec="tiny-f8") as url, Client(url, "tiny-f8") as client:
        yield client


class ReferenceInFp64:
    """The published modules; encoder and search run in fp64, so that rounding decides no near-tie."""

    def __init__(self) -> None:
        self.exact: VQGAN = load_model("tiny-f8").double().eval()
        self.engine = create(EngineConfig("reference", device="cpu"), load_model("tiny-f8"))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.exact.quantize.nearest(self.exact.latents(images.double() * 2 - 1))

    def decode(self, indices: Tensor) -> Tensor:
        return self.engine.decode(indices)


@pytest.fixture(scope="module")
def reference() -> ReferenceInFp64:
    return ReferenceInFp64()


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns 17 crops of photographs, and the gradients of a random network's summed loss there."""
    images = np.stack([crop(NAMES[i % 4], 80 + 8 * i, 64)[:, 8 * i : 8 * i + 64] for i in range(17)])
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 5, 2))
    x = (torch.from_numpy(images).float() / 255).requires_grad_()
    network(x).square().sum().backward()
    assert x.grad is not None
    return images, x.grad.numpy() * 10


def algorithm_1(
    reference: ReferenceInFp64,
    images: np.ndarray,
    g: np.ndarray,
    *,
    base: str,
    normalize: str,
    alpha: float,
    epsilon: float | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns the tokens of Q(x) and of Q(x + δ), computed for each sample alone."""
    clean, attacked = [], []
    for image, gradient in zip(images, g, strict=True):
        x = torch.from_numpy(image[None]).float() / 255
        tokens = reference.encode(x)
        start = x if base == "x" else reference.decode(tokens).clamp(0, 1)
        d = torch.from_numpy(gradient[None]).float()
        if normalize == "l2":
            d = (d.double() / (d.double().norm() + 1e-10)).float()
        elif normalize == "sign":
            d = d.sign()
        delta = alpha * d
        if epsilon is not None:
            delta = delta.clamp(-epsilon, epsilon)
        clean.append(tokens.numpy())
        attacked.append(reference.encode((start + delta).clamp(0, 1)).numpy())
    return np.concatenate(clean), np.concatenate(attacked)


COMBINATIONS = [
    *((preset, None, None) for preset in ("paper", "easyrobust")),
    *itertools.product((None,), ("none", "l2", "sign"), (None, 0.02)),
]


@pytest.mark.parametrize(("preset", "normalize", "epsilon"), COMBINATIONS)
@pytest.mark.parametrize("n", [1, 17])
def test_tokens_are_those_of_algorithm_1(
    codec: Client, reference: ReferenceInFp64, batch: tuple[np.ndarray, np.ndarray], n: int, preset: str | None,
    normalize: str | None, epsilon: float | None,
) -> None:  # fmt: skip
    images, g = batch[0][:n], batch[1][:n]
    step: dict[str, Any] = {
        "base": "reconstruction" if preset == "easyrobust" else "x",
        "normalize": normalize or ("l2" if preset == "easyrobust" else "none"),
        "alpha": 0.1 if preset else 1.5,
        "epsilon": epsilon,
    }
    clean, attacked = algorithm_1(reference, images, g, **step)
    options = {"preset": preset} if preset else step
    q = codec.discretize(
        images,
        gradients=g,
        gradient_dtype="FP32",
        outputs=["indices", "adversarial_indices", "adversarial"],
        **options,
    )
    assert np.array_equal(q.indices, clean)
    assert np.array_equal(q.adversarial_indices, attacked)
    assert np.array_equal(codec.decode(attacked), q.adversarial)
    assert q.tokens_changed is not None
    assert q.tokens_changed > 0.01  # the step does something
    if step["base"] == "x":
        assert q.tokens_changed == pytest.approx((clean != attacked).mean(), abs=1e-6)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-30])
def test_gradient_scale_and_alpha_cancel(codec: Client, batch: tuple[np.ndarray, np.ndarray], scale: float) -> None:
    """All tokens agree if scaling is exact; 1e-6 changes the last bit of g, and so one near-tie in a thousand."""
    images, g = batch

    def tokens(s: float, dtype: str) -> np.ndarray:
        scaled = (g * s).astype(np.float32)
        options: dict[str, Any] = {"preset": "paper", "alpha": 1 / s, "gradient_dtype": dtype}
        q = codec.discretize(images, scaled, outputs=["adversarial_indices"], **options)
        return np.asarray(q.adversarial_indices)

    assert np.array_equal(tokens(scale, "FP16"), tokens(1.0, "FP16"))
    assert (tokens(1e-6, "FP32") == tokens(1.0, "FP32")).mean() > 0.995
    assert (tokens(1e-9, "FP16") == tokens(1.0, "FP32")).mean() > 0.99


def test_half_precision_gradients_flip_next_to_nothing(codec: Client, batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, g = batch
    answers = [
        codec.discretize(
            images, gradients=g, preset="paper", alpha=1.0, gradient_dtype=dtype, outputs=["adversarial_indices"]
        )
        for dtype in ("FP16", "FP32")
    ]
    half, full = (q.adversarial_indices for q in answers)
    assert half is not None
    assert (half == full).mean() > 0.995


def test_two_clients_interleaved_get_their_own(codec: Client, batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, g = batch
    steps: list[dict[str, Any]] = [{"preset": "paper", "alpha": 1.0}, {"preset": "easyrobust", "alpha": 3.0}]
    expected = [codec.discretize(images, gradients=g, outputs=["adversarial_indices"], **s) for s in steps]

    def run(which: int) -> list[Any]:
        with Client(codec.url, "tiny-f8") as c:
            return [
                c.discretize(images, gradients=g, outputs=["adversarial_indices"], **steps[which]) for _ in range(4)
            ]

    with ThreadPoolExecutor(2) as pool:
        for which, answers in enumerate(pool.map(run, range(2))):
            for q in answers:
                assert np.array_equal(q.adversarial_indices, expected[which].adversarial_indices)


def test_default_outputs_and_dtypes(codec: Client, batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, g = batch
    q = codec.discretize(images[:2], g[:2])
    assert q.reconstruction is not None
    assert q.adversarial is not None
    assert q.indices is None
    assert q.adversarial.shape == images[:2].shape
    half = codec.discretize(torch.from_numpy(images[:2]), torch.from_numpy(g[:2]), output_dtype="FP16")
    assert isinstance(half.adversarial, torch.Tensor)
    assert (half.adversarial.float() * 255 - torch.from_numpy(q.adversarial).float()).abs().max() < 1


@pytest.mark.parametrize("preset", ["paper", "easyrobust"])
def test_tokens_changed_is_0_at_alpha_0_and_grows(
    codec: Client, batch: tuple[np.ndarray, np.ndarray], preset: str
) -> None:
    images, g = batch
    shares = [
        codec.discretize(images, g, preset=preset, alpha=alpha, outputs=["adversarial_indices"]).tokens_changed
        for alpha in (0, 0.1, 0.2, 0.4)
    ]
    assert shares[0] == 0
    assert 0 < shares[1] < shares[2] < shares[3] < 1  # type: ignore[operator]


def test_replaced_tokens_do_not_depend_on_the_split(codec: Client, batch: tuple[np.ndarray, np.ndarray]) -> None:
    images = batch[0]
    outputs = ["indices", "adversarial_indices"]
    whole = codec.discretize(images, outputs=outputs, replace_fraction=0.25, seed=5)
    parts = [
        codec.discretize(images[i : i + 5], outputs=outputs, replace_fraction=0.25, seed=5) for i in range(0, 17, 5)
    ]
    assert whole.tokens_changed == 0.25
    assert np.array_equal(whole.adversarial_indices, np.concatenate([q.adversarial_indices for q in parts]))


def test_odd_sizes(codec: Client) -> None:
    images = crop("coffee", 75, 101)[None]
    q = codec.discretize(images, np.full(images.shape, 0.5, np.float32))
    assert q.adversarial is not None
    assert q.adversarial.shape == images.shape


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alpha": "much"}, "alpha"),
        ({"epsilon": -1}, "epsilon"),
        ({"normalize": "l1"}, "l1"),
        ({"preset": "madry"}, "easyrobust"),
        ({"base": "noise"}, "base"),
        ({"replace_fraction": 1.5}, "replace_fraction"),
        ({"seed": -1}, "seed"),
        ({"gradient_dtype": "BF16"}, "gradient_dtype"),
        ({"gradients": np.zeros((1, 3, 8, 8), np.float32)}, "shape"),
        ({"gradients": np.zeros((2, 3, 64, 64))}, "float64"),
        ({"gradients": np.full((2, 3, 64, 64), np.nan, np.float32)}, "NaN"),
        ({"gradients": None, "outputs": ["adversarial"]}, "adversarial without gradients"),
    ],
)
def test_what_is_wrong_is_named(
    codec: Client, batch: tuple[np.ndarray, np.ndarray], changes: Any, says: str
) -> None:
    arguments = {"gradients": batch[1][:2]} | changes
    with pytest.raises(InvalidRequest, match=says):
        codec.discretize(batch[0][:2], **arguments)
    assert codec.discretize(batch[0][:1]).reconstruction is not None


GOOD = {"gradients": np.full((2, 3, 8, 8), 0.5, np.float16), "gradient_scales": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"gradients": np.zeros((2, 3, 8, 9), np.float16)}, "gradients"),
        ({"gradients": np.zeros((2, 3, 8, 8))}, "gradients"),
        ({"gradients": np.full((2, 3, 8, 8), np.inf, np.float16)}, "gradients"),
        ({"gradients": None}, "gradient_scales"),
        ({"gradient_scales": np.ones(3, np.float32)}, "gradient_scales"),
        ({"gradient_scales": np.ones(2)}, "gradient_scales"),
        ({"gradient_scales": np.array([1, -1], np.float32)}, "gradient_scales"),
        ({"gradient_scales": np.array([1, np.nan], np.float32)}, "gradient_scales"),
        (
            {"gradients": np.full((2, 3, 8, 8), 6e4, np.float16), "gradient_scales": np.full(2, 3e38, np.float32)},
            "gradient_scales",
        ),
    ],
)
def test_what_a_stranger_sends_as_gradients(codec: Client, changes: Any, field: str) -> None:
    tensors = {"images": np.zeros((2, 3, 8, 8), np.uint8)} | GOOD | changes
    chunks, length = wire.encode_request({k: v for k, v in tensors.items() if v is not None})
    headers = {wire.HEADER_LENGTH: str(length)}
    reply = send(codec.url, "POST", "/v2/models/tiny-f8/infer", b"".join(chunks), headers)
    assert reply.status == 422, reply.body
    assert reply.error["field"] == field


def test_step_parameters_do_not_belong_to_decoding(codec: Client) -> None:
    with pytest.raises(InvalidRequest, match="replace_fraction"):
        codec.decode(np.zeros((1, 2, 2), np.uint16), replace_fraction=0.5)


def test_identity_shows_the_step_itself() -> None:
    images = np.full((1, 3, 4, 4), 0.5, np.float32)
    with app_in_thread(codec="identity") as url, Client(url, "identity") as client:
        q = client.discretize(images, np.full_like(images, 2.0), preset="paper", alpha=0.1)
    assert q.adversarial is not None
    assert np.allclose(q.adversarial, 0.7)
    assert q.tokens_changed is None
