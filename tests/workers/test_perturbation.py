"""Algorithm 1's step, against its formula, and what must hold whatever the numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dat_workers.perturbation import PRESETS, Step, direction, perturb, replace_tokens


def sample(seed: int, n: int = 3, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, q = torch.rand(2, n, 3, 8, 8, generator=generator)
    return x, q, torch.randn(n, 3, 8, 8, generator=generator) * scale


def test_presets_are_the_table_of_the_design() -> None:
    assert PRESETS["paper"] == Step("x", "none", 0.1, None)
    assert PRESETS["easyrobust"] == Step("reconstruction", "l2", 0.1, None)


def test_paper_step() -> None:
    x, q, g = sample(0)
    assert torch.equal(perturb(x, q, g, PRESETS["paper"]), (x + 0.1 * g).clamp(0, 1))


def test_easyrobust_step_has_length_alpha_and_starts_at_the_reconstruction() -> None:
    x, q, g = sample(1)
    q = q * 0.5 + 0.25
    delta = perturb(x, q, g, PRESETS["easyrobust"]) - q
    assert torch.allclose(delta.flatten(1).norm(dim=1), torch.full((3,), 0.1), rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(delta.flatten(1), g.flatten(1)).min() > 0.9999


@given(st.integers(0, 100), st.sampled_from(["none", "l2", "sign"]), st.sampled_from(["x", "reconstruction"]))
@settings(deadline=None, max_examples=30)
def test_a_sample_does_not_depend_on_its_company(seed: int, normalize: Any, base: Any) -> None:
    x, q, g = sample(seed, n=5)
    step = Step(base, normalize, 0.3, 0.2)
    together = perturb(x, q, g, step)
    alone = torch.cat([perturb(x[i : i + 1], q[i : i + 1], g[i : i + 1], step) for i in range(5)])
    assert torch.equal(together, alone)


@given(st.integers(0, 50), st.floats(1e-3, 0.2), st.sampled_from(["none", "l2", "sign"]))
@settings(deadline=None, max_examples=30)
def test_epsilon_bounds_delta_and_the_picture_stays_one(seed: int, epsilon: float, normalize: Any) -> None:
    x, q, g = sample(seed, scale=100)
    adversarial = perturb(x, q, g, Step("x", normalize, 1.0, epsilon))
    assert (adversarial - x).abs().max() <= epsilon + 1e-7  # x + δ is rounded
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e9, 1e20, 1e37])
def test_l2_direction_has_length_one_at_any_scale_above_the_guard(scale: float) -> None:
    g = direction(sample(2, scale=scale)[2], "l2")
    norms = g.double().flatten(1).norm(dim=1)
    assert g.isfinite().all()
    length = scale * sample(2)[2].double().flatten(1).norm(dim=1)
    assert torch.allclose(norms, length / (length + 1e-10), rtol=1e-4)


def test_no_gradient_and_no_alpha_change_nothing() -> None:
    x, q, g = sample(3)
    for normalize in ("none", "l2", "sign"):
        assert torch.equal(perturb(x, q, torch.zeros_like(g), Step("x", normalize)), x)
        assert torch.equal(perturb(x, q, g, Step("reconstruction", normalize, 0.0)), q)


@given(st.integers(0, 2**63), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_replaced_tokens(seed: int, fraction: float) -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    indices = torch.from_numpy(np.random.default_rng(1).integers(0, 512, (4, 6, 7)))
    out = replace_tokens(indices, images, fraction, seed, 512)
    assert ((out != indices).flatten(1).sum(1) == round(fraction * 42)).all()
    assert out.min() >= 0
    assert out.max() < 512
    assert torch.equal(out[2:3], replace_tokens(indices[2:3], images[2:3], fraction, seed, 512))
    assert torch.equal(out.flip(0), replace_tokens(indices.flip(0), images.flip(0), fraction, seed, 512))
    indices[1, 2, 3] = (indices[1, 2, 3] + 1) % 512  # a near-tie that went the other way moves no other token
    assert (replace_tokens(indices, images, fraction, seed, 512) != out).sum() <= 1


def test_another_seed_and_another_image_replace_others() -> None:
    indices = torch.zeros(2, 20, 20, dtype=torch.int64)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    one, other = (replace_tokens(indices, images, 0.5, seed, 512) for seed in (1, 2))
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
