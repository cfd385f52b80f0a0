"""The same tokens as the published modules: full-size networks in the published checkpoint format.

The weights are random (the published ones cannot be shipped); the codebook is drawn at the scale of the latents, so
that near-ties mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dat_workers.codecs.checkpoint import load_published
from dat_workers.codecs.file import Origin
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.registry import REGISTRY
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import CodecStore, load_model
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.verify.agreement import compare

TINY = CodecSpec(
    "toy", ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(64,), codebook_size=512, latent_dim=4
)


def random_codec(spec: CodecSpec, images: torch.Tensor) -> VQGAN:
    """Random weights; codebook vectors with the mean and spread of the latents of `images`."""
    torch.manual_seed(0)
    model = VQGAN(spec).eval().requires_grad_(False)
    z = model.latents(images[:1] * 2 - 1).transpose(0, 1).flatten(1)
    noise = torch.randn(spec.codebook_size, spec.latent_dim)
    model.quantize.embedding.weight.copy_(z.mean(1) + noise * z.std(1))
    return model


def published_checkpoint(model: VQGAN, path: Path) -> None:
    """A Lightning checkpoint as taming-transformers writes it, with its discriminator and perceptual loss."""
    state = dict(model.state_dict())
    state["loss.discriminator.main.0.weight"] = torch.randn(64, 3, 4, 4)
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.randn(1, 64, 1, 1)
    torch.save(
        {"epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.0.8", "state_dict": state,
         "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": []}, path,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"), [("vqgan-openimages-f8-16384", 67.7), ("vqgan-imagenet-f16-1024", None)]
)
def test_full_size_codec_gives_the_published_modules_tokens(
    name: str, count: float | None, photographs: np.ndarray, tmp_path: Path
) -> None:
    spec = REGISTRY[name]
    images = torch.from_numpy(photographs[:2]).float() / 255
    checkpoint = tmp_path / "model.ckpt"
    published_checkpoint(random_codec(spec, images), checkpoint)
    store = CodecStore(tmp_path / "home")
    store.add(spec, load_published(checkpoint, spec), Origin("test", "", ""))
    model = load_model(store.load(name))
    if count:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(count, abs=0.05)
    ours = create(EngineConfig("torch", device="cpu", dtype="fp32"), model)
    reference = create(EngineConfig("reference", device="cpu"), model)
    tokens = ours.encode(images)
    assert torch.equal(tokens, reference.encode(images))
    assert len(tokens.unique()) > 50  # a codebook that is used: equality is no accident
    assert (ours.decode(tokens) - reference.decode(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("attention", [(), (64,), (256, 128)])
def test_attention_sits_where_the_published_modules_have_it(
    attention: tuple[int, ...], photographs: np.ndarray
) -> None:
    spec = CodecSpec(
        "toy",
        ch=32,
        ch_mult=(1, 1, 2),
        num_res_blocks=1,
        attn_resolutions=attention,
        codebook_size=512,
        latent_dim=4,
    )
    images = torch.from_numpy(photographs[:2, :, :64, :96]).float() / 255
    model = random_codec(spec, images)
    agreement = compare(
        create(EngineConfig("torch", device="cpu"), model),
        create(EngineConfig("reference", device="cpu"), model),
        images,
    )
    assert agreement.token_agreement == 1
    assert agreement.largest_difference < 1e-4
    assert agreement.shortfall == ""


def test_compare_sees_one_wrong_weight(photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs[:2, :, :64, :64]).float() / 255
    model = random_codec(TINY, images)
    reference = create(EngineConfig("reference", device="cpu"), model)
    model.encoder.conv_out.bias.add_(1.0)
    agreement = compare(create(EngineConfig("torch", device="cpu"), model), reference, images)
    assert agreement.token_agreement < 0.9
    assert agreement.shortfall


def test_half_precision_keeps_its_promise_or_says_so(photographs: np.ndarray) -> None:
    """bf16 by the rules of the CUDA path, on the CPU: first and last convolution and distances stay fp32."""
    images = torch.from_numpy(photographs[:2, :, :64, :64]).float() / 255
    model = random_codec(TINY, images)
    half = create(EngineConfig("torch", device="cpu", dtype="bf16"), model)
    agreement = compare(half, create(EngineConfig("reference", device="cpu"), model), images)
    assert agreement.half
    assert 0.5 < agreement.token_agreement < 1  # random weights: half precision does flip tokens
    assert agreement.non_finite == 0


def test_tiny_f8_runs_in_the_published_modules(photographs: np.ndarray) -> None:
    model = load_model("tiny-f8")
    images = torch.from_numpy(photographs).float() / 255
    agreement = compare(
        create(EngineConfig("torch", device="cpu"), model),
        create(EngineConfig("reference", device="cpu"), model),
        images,
    )
    assert agreement.token_agreement >= 0.9999
    assert agreement.shortfall == ""


@pytest.mark.parametrize(
    ("engine", "device", "dtype", "says"),
    [
        ("onyx", "cpu", "auto", "onyx"),
        ("torch", "cpu", "fp8", "fp8"),
        ("torch", "warp", "auto", "warp"),
        ("reference", "cpu", "fp16", "fp32"),
    ],
)
def test_engine_that_cannot_be_made_says_why(engine: str, device: str, dtype: str, says: str) -> None:
    model = VQGAN(TINY)
    with pytest.raises(ValueError, match=says):
        create(EngineConfig(engine, device=device, dtype=dtype), model)
