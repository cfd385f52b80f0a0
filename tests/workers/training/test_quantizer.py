"""The codebook follows its tokens."""

from __future__ import annotations

import pytest
import torch

from dat_workers.codecs.networks.vqgan import Codebook
from dat_workers.training.quantizer import EmaQuantizer


def test_codebook_follows_its_tokens_and_revives_the_dead() -> None:
    torch.manual_seed(0)
    codebook = Codebook(16, 4)
    quantizer = EmaQuantizer(codebook, decay=0.8)
    latents = torch.randn(4096, 4)
    assert list(quantizer.initialise(latents)) == list(range(11))
    shifted = torch.randn(4, 4, 16, 16) + 5
    for _ in range(60):
        quantized, commitment, indices = quantizer(shifted, learn=True, revive=True)
    assert commitment < 1.0  # the codebook came after the latents: before, it was about 100
    assert len(indices.unique()) == 16
    assert quantizer.usage() > 0.5
    quantized, _, indices = quantizer(shifted, learn=False, revive=False)
    assert torch.allclose(quantized, codebook.lookup(indices))


def test_straight_through_passes_the_gradient_on() -> None:
    quantizer = EmaQuantizer(Codebook(8, 4))
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantized, _, _ = quantizer(z, learn=False, revive=False)
    upstream = torch.randn_like(quantized)
    quantized.backward(upstream)
    assert z.grad is not None
    assert torch.equal(z.grad, upstream)


def test_kmeans_needs_enough_latents() -> None:
    with pytest.raises(ValueError, match=r"7 latent vectors.*8"):
        list(EmaQuantizer(Codebook(8, 4)).initialise(torch.randn(7, 4)))
