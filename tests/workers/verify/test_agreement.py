"""Token agreement and fidelity of one engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_workers.codecs.store import load_model
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.errors import InvalidInput
from dat_workers.verify.agreement import (
    Agreement,
    compare_outputs,
    encode,
    jaccard,
    reference_outputs,
    stand_in_gradients,
)
from dat_workers.verify.survey import Row


def test_jaccard() -> None:
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a, a) == 1
    assert jaccard(a & ~a, a & ~a) == 1


def test_fidelity_is_one_for_the_same_codec_and_falls_with_bf16(images: Tensor) -> None:
    model = load_model("tiny-f8")
    reference = create(EngineConfig("reference", device="cpu"), model)
    expected = reference_outputs(reference, images, lambda q: 30 * stand_in_gradients(q))
    assert expected.changed is not None
    assert expected.changed.any()
    exact = compare_outputs(create(EngineConfig("torch", device="cpu"), load_model("tiny-f8")), expected)
    assert (exact.token_agreement, exact.fidelity, exact.own_fidelity) == (1, 1, 1)
    assert exact.shortfall == ""
    half = compare_outputs(
        create(EngineConfig("torch", device="cpu", dtype="bf16"), load_model("tiny-f8")), expected
    )
    assert half.fidelity is not None
    assert half.fidelity < 0.9
    assert "fidelity" in half.shortfall


def test_stand_in_gradients_are_the_same_every_time(images: Tensor) -> None:
    g = stand_in_gradients(images)
    assert torch.equal(g, stand_in_gradients(images))
    assert g.shape == images.shape
    assert (g.flatten(1).norm(dim=1) > 0).all()
    assert torch.allclose(g[1:], stand_in_gradients(images[1:]), rtol=1e-3, atol=1e-9)


class Overflowing:
    """An engine whose encoder overflows on the image that begins with a white pixel, and whose pictures are NaN."""

    name, device, dtype, batch, most_rows = "overflowing", torch.device("cpu"), "fp16", 4, 0

    def encode(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 8, 8, dtype=torch.int64) - (images[:, 0, 0, 0] == 1).int()[:, None, None]

    def decode(self, indices: Tensor) -> Tensor:
        return torch.full((len(indices), 3, 64, 64), torch.nan)


def test_images_that_overflow_are_counted_one_by_one(images: Tensor) -> None:
    marked = images.clone() * 0.5
    marked[1, 0, 0, 0] = 1
    tokens = encode(Overflowing(), marked)
    assert (tokens[0] == 0).all()
    assert (tokens[1] == -1).all()
    reference = create(EngineConfig("reference", device="cpu"), load_model("tiny-f8"))
    agreement = compare_outputs(Overflowing(), reference_outputs(reference, marked, stand_in_gradients))
    assert agreement.non_finite == 2
    assert "2 images are not finite" in agreement.shortfall
    assert np.isnan(agreement.psnr_db)
    json.dumps(Row("overflowing", "fp16", False, agreement).to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("differing", "tokens", "half", "undecided", "text"),
    [
        (
            1,
            3136,
            False,
            True,
            "token agreement 99.9681%, must be at least 99.99%: 3136 tokens are too few to judge it",
        ),
        (5, 3136, False, False, "token agreement 99.8406%, must be at least 99.99%"),
        (2, 10_000, False, False, "token agreement 99.9800%, must be at least 99.99%"),
        (
            1,
            128,
            True,
            True,
            "token agreement 99.2188%, must be at least 99.50%: 128 tokens are too few to judge it",
        ),
        (64, 128, True, False, "token agreement 50.0000%, must be at least 99.50%"),
        (0, 128, True, False, ""),
    ],
)
def test_few_tokens_decide_only_what_they_can(
    differing: int, tokens: int, half: bool, undecided: bool, text: str
) -> None:
    agreement = Agreement(1 - differing / tokens, 100.0, 0.0, 0, half, tokens=tokens)
    assert agreement.undecided == undecided
    assert agreement.shortfall.startswith(text)
    if undecided:
        needed = 200 if half else 10_000
        assert agreement.shortfall.endswith(f"which takes {needed}")
        assert agreement.pictures_factor == pytest.approx(needed / tokens)


def test_fidelity_of_few_tokens_is_not_judged_either() -> None:
    agreement = Agreement(1.0, 100.0, 0.0, 0, False, fidelity=0.9, tokens=20_000, changed=10)
    assert agreement.undecided
    assert "10 tokens are too few to judge it, which takes 20" in agreement.shortfall
    assert not Agreement(1.0, 100.0, 0.0, 0, False, fidelity=0.5, tokens=20_000, changed=10).undecided
    assert not Agreement(1.0, 20.0, 0.0, 0, False, fidelity=0.9, tokens=20_000, changed=10).undecided


def test_a_step_that_changes_nothing_gives_no_fidelity(images: Tensor) -> None:
    reference = create(EngineConfig("reference", device="cpu"), load_model("tiny-f8"))
    expected = reference_outputs(reference, images, lambda q: torch.zeros_like(q))
    agreement = compare_outputs(reference, expected)
    assert (agreement.fidelity, agreement.own_fidelity, agreement.changed) == (None, None, 0)
    with pytest.raises(InvalidInput, match="0 images"):
        reference_outputs(reference, images[:0])
