"""The network rebuilt for speed is the network: each trick alone and all together, by their plain ways on a CPU."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dat_workers.codecs.networks.vqgan import VQGAN, ResnetBlock, Upsample
from dat_workers.codecs.registry import REGISTRY
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import load_model
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.engines.torch import network
from dat_workers.engines.torch.network import (
    FP32_LAYERS,
    Convolution,
    FastAttention,
    FastNorm,
    FoldedUpsample,
    build,
)
from dat_workers.engines.torch.precision import arithmetic
from dat_workers.engines.torch.tricks import Tricks
from dat_workers.verify.agreement import compare
from tests.workers.engines.test_parity import random_codec

EACH = [field.name for field in fields(Tricks) if field.name not in ("graphs", "overlap")]
TOY = CodecSpec(
    "toy", ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(64,), codebook_size=512, latent_dim=4
)


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 5)])
def test_folded_upsample_is_the_same_sum(height: int, width: int, nhwc: bool) -> None:
    """In fp64, borders included: what is left is the order of additions."""
    torch.manual_seed(0)
    plain = Upsample(6).double().requires_grad_(False)
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    folded = FoldedUpsample(plain.conv, torch.float64, nhwc=nhwc)
    out = folded(x)
    assert out.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    torch.testing.assert_close(out, plain(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tricks", ["none", *EACH, "all"])
def test_tiny_f8_by_every_trick(tricks: str, photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs[:2]).float() / 255
    model = load_model("tiny-f8")
    fast = create(EngineConfig("torch", device="cpu", dtype="fp32", tricks=tricks), model)
    plain = create(EngineConfig("torch", device="cpu", tricks="none"), model)
    with torch.inference_mode():
        torch.testing.assert_close(
            fast.model.latents(images * 2 - 1), model.latents(images * 2 - 1), rtol=1e-4, atol=2e-5
        )
    agreement = compare(fast, plain, images)
    # another order of additions moves a token in a thousand (ARCHITECTURE.md); these two keep the order
    assert agreement.token_agreement >= (1 if tricks in ("none", "fused_codebook") else 0.998)
    assert agreement.largest_difference < 1e-4


def test_the_fused_norm_takes_the_bias_of_the_convolution_before_it() -> None:
    torch.manual_seed(0)
    model = VQGAN(TOY).double()
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, ResnetBlock)]
    for _, block in blocks:
        torch.nn.init.uniform_(block.conv1.bias, -5, 5)
    fast = build(model, "fp32", Tricks(fused_norm=True))
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    for name, block in blocks:
        moved = fast.get_submodule(name)
        assert moved.conv1.bias is None
        assert torch.equal(moved.norm2.shift, block.conv1.bias.float())
        assert moved.norm1.shift is None
        assert moved.conv2.bias is not None
    torch.testing.assert_close(fast.latents(x).double(), model.latents(x.double()), rtol=1e-3, atol=1e-4)
    half = build(model.float(), "bf16", Tricks(fused_norm=True))  # the bias is not rounded to 8 bits
    assert torch.equal(half.decoder.mid.block_1.norm2.shift, model.decoder.mid.block_1.conv1.bias)


@pytest.mark.parametrize("name", ["vqgan-openimages-f8-16384", "vqgan-imagenet-f16-1024"])
def test_full_size_geometry_by_all_tricks(name: str, photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs[:1, :, :64, :96]).float() / 255
    model = random_codec(REGISTRY[name], images)
    fast = build(model, "fp32", Tricks.parse("all", cuda=False))
    kinds = {type(module) for module in fast.modules()}
    assert {FastNorm, Convolution, FoldedUpsample, FastAttention} <= kinds
    with torch.inference_mode():
        z = model.latents(images * 2 - 1)
        torch.testing.assert_close(fast.latents(images * 2 - 1), z, rtol=1e-3, atol=1e-4)
        tokens = model.quantize.nearest(z)
        torch.testing.assert_close(fast.decode(tokens), model.decode(tokens), rtol=1e-3, atol=1e-4)


def test_building_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = VQGAN(TOY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = build(model, "bf16", Tricks.parse("all", cuda=False))
    fast.encoder.conv_out.weight.fill_(7)
    assert build(model, "fp32", Tricks()) is model
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == torch.float32 for name, tensor in before.items()
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("tricks", ["none", "all"])
def test_half_precision_but_for_the_listed_layers(precision: str, tricks: str) -> None:
    half = network.DTYPES[precision]
    fast = build(VQGAN(TOY), precision, Tricks.parse(tricks, cuda=False))
    for name, module in fast.named_modules():
        if isinstance(module, Convolution):
            listed = any(name.startswith(layer) for layer in FP32_LAYERS)
            assert module.weight.dtype == (torch.float32 if listed else half), name
    assert fast.quantize.embedding.weight.dtype == torch.float32
    seen: dict[str, torch.dtype] = {}
    for name, module in fast.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.dtype}))
    with torch.inference_mode():
        z = fast.latents(torch.rand(1, 3, 32, 32))
        picture = fast.pictures(z)
    assert (z.dtype, picture.dtype) == (torch.float32, half)
    assert seen["encoder.down.0.block.0"] == seen["encoder.mid"] == seen["decoder.mid"] == half
    assert seen["encoder.norm_out"] == seen["encoder.conv_out"] == torch.float32


def test_a_layer_that_is_listed_runs_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FP32_LAYERS, "decoder.up.0.block.1", "a test")
    fast = build(VQGAN(TOY), "fp16", Tricks())
    assert fast.decoder.up[0].block[1].conv1.weight.dtype == torch.float32
    assert fast.decoder.up[0].block[0].conv1.weight.dtype == torch.float16
    with torch.inference_mode():
        assert fast.pictures(torch.randn(1, 4, 4, 4)).isfinite().all()


def test_attention_scores_past_65504_do_not_overflow() -> None:
    """512 products of 16·16 are 131072: unscaled they would be infinite in fp16."""
    from dat_workers.codecs.networks.vqgan import AttnBlock

    block = AttnBlock(512).requires_grad_(False)
    for conv in (block.q, block.k):
        conv.weight.copy_(16 * torch.eye(512)[:, :, None, None])
        conv.bias.zero_()
    x = torch.ones(1, 512, 2, 2).half() * torch.tensor([1.0, -1, 1, -1]).half().view(1, 1, 2, 2)
    for tricks in (Tricks(), Tricks(sdpa=True)):
        assert FastAttention(block, torch.float16, tricks)(x).isfinite().all()


def test_engine_marks_the_image() -> None:
    torch.manual_seed(0)
    engine = create(EngineConfig("torch", device="cpu", dtype="fp32", tricks="all"), VQGAN(TOY))
    images = torch.rand(3, 3, 16, 16)
    images[1, 0, 0, 0] = torch.inf
    tokens = engine.encode(images)
    assert (tokens[1] == -1).all()
    assert (tokens[[0, 2]] >= 0).all()
    assert engine.decode(tokens).isfinite().all()  # of -1 something, since the caller has been told


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="tf32"):
        create(EngineConfig("torch", device="cpu", dtype="tf32"), VQGAN(TOY))


def test_fp32_layers_switch_tf32_off_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = build(VQGAN(TOY), "tf32", Tricks())
    plain, used = F.conv2d, []

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        used.append((weight, torch.backends.cudnn.conv.fp32_precision))
        return plain(x, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "conv2d", conv2d)
    with arithmetic(tf32=True), torch.inference_mode():
        fast.latents(torch.rand(1, 3, 16, 16))
    exact = {id(fast.encoder.conv_in.weight), id(fast.encoder.conv_out.weight), id(fast.quant_conv.weight)}
    assert len(used) > 10
    assert all(precision == ("ieee" if id(weight) in exact else "tf32") for weight, precision in used)


def test_reference_engine_knows_no_tricks() -> None:
    with pytest.raises(ValueError, match="sdpa"):
        create(EngineConfig("reference", device="cpu", tricks="sdpa"), VQGAN(TOY))


def test_mixed_keeps_the_tokens_and_halves_the_decoder() -> None:
    torch.manual_seed(0)
    model = VQGAN(TOY)
    exact, mixed, half = (
        create(EngineConfig("torch", device="cpu", dtype=d), model) for d in ("fp32", "mixed", "fp16")
    )
    images = torch.rand(8, 3, 32, 32)
    tokens = exact.encode(images)
    assert torch.equal(mixed.encode(images), tokens)
    assert not torch.equal(half.encode(images), tokens)
    assert torch.equal(mixed.decode(tokens), half.decode(tokens))
    assert {p.dtype for p in mixed.model.encoder.parameters()} == {torch.float32}
