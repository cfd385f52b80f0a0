"""The layer that overflows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dat_workers.codecs.store import load_model
from dat_workers.verify.diagnose import find_overflow


@pytest.mark.parametrize(
    ("layer", "weight", "says"),
    [
        ("decoder.up.1.block.0.conv1", 1e6, "decoder.up.1.block.0.conv1"),
        ("encoder.down.1.block.0.conv2", 1e6, "encoder.down.1.block.0.conv2"),
        ("decoder.mid.attn_1.q", 1e5, "decoder.mid.attn_1"),
    ],
)
def test_the_layer_that_overflows_is_named(images: Tensor, layer: str, weight: float, says: str) -> None:
    model = load_model("tiny-f8")
    model.get_submodule(layer).weight.mul_(weight)
    tokens = torch.zeros(2, 8, 8, dtype=torch.int64)
    found = find_overflow(model, images, tokens, device="cpu", dtype="fp16")
    assert found is not None
    assert found.layer.startswith(says)
    assert 0 < found.largest_input < 65504
    assert find_overflow(load_model("tiny-f8"), images[:1], tokens[:1], device="cpu", dtype="fp16") is None
