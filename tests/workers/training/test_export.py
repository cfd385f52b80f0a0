"""The weights of a trained network are the same codec."""

from __future__ import annotations

import pytest
import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecSpec
from dat_workers.training.export import exported_weights

SPEC = CodecSpec("toy-f2", ch=32, ch_mult=(1, 1), num_res_blocks=1, codebook_size=64, latent_dim=4)


@pytest.mark.parametrize("half", [False, True])
def test_export_is_the_same_codec(half: bool) -> None:
    torch.manual_seed(0)
    model = VQGAN(SPEC).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        model.quant_conv.bias.add_(3)  # type: ignore[union-attr]
        z = model.latents(x)
        model.quantize.embedding.weight.copy_(z.permute(0, 2, 3, 1).reshape(-1, 4)[:64])
        kept = VQGAN(SPEC).eval()
        kept.load_state_dict(exported_weights(model, half=half))
        assert kept.quantize.embedding.weight.mean(0).abs().max() < 1e-3
        assert (kept.encode(x) == model.encode(x)).float().mean() > (0.9 if half else 0.99)
        tokens = model.encode(x)
        assert (kept.decode(tokens) - model.decode(tokens)).abs().max() < (0.02 if half else 1e-3)
