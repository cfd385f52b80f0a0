"""The loss terms."""

from __future__ import annotations

import pytest
import torch

from dat_workers.training.losses import adaptive_weight, discriminator_loss, ssim, structure_term


def test_terms_know_right_from_wrong() -> None:
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    noisy = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-5)
    assert ssim(x, noisy) < 0.95
    assert structure_term(x, x) < 1e-4 < structure_term(x, noisy)
    assert discriminator_loss(torch.full((4,), 2.0), torch.full((4,), -2.0)) == 0
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert adaptive_weight((weight * 6).sum(), (weight * 2).sum(), weight) == pytest.approx(3, rel=1e-4)
