"""The CPU's default engine: the published tokens, pictures that look the same, and no dependence on company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dat_workers.codecs.networks.vqgan import VQGAN, Norm, Upsample
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import load_model
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.cpu.engine import CpuEngine, FastDecoder, TransposedUpsample, norm_silu
from dat_workers.engines.factory import create
from dat_workers.errors import EngineError
from dat_workers.system.threads import DaemonThreads
from dat_workers.verify.agreement import compare


@pytest.fixture(scope="module")
def engine() -> CpuEngine:
    made = create(EngineConfig("cpu", device="cpu"), load_model("tiny-f8"))
    assert isinstance(made, CpuEngine)
    return made


def test_tokens_are_the_published_modules(engine: CpuEngine, photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs).float() / 255
    agreement = compare(engine, create(EngineConfig("reference", device="cpu"), load_model("tiny-f8")), images)
    assert agreement.token_agreement == 1
    assert agreement.shortfall == ""
    assert agreement.largest_difference < 1e-3


def test_an_image_does_not_depend_on_its_company(engine: CpuEngine, photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs[:3, :, :96, :128]).float() / 255
    indices = engine.encode(images)
    pictures = engine.decode(indices)
    for i in range(3):
        assert torch.equal(engine.encode(images[i : i + 1])[0], indices[i])
        assert torch.equal(engine.decode(indices[i : i + 1])[0], pictures[i])


def test_two_at_a_time_are_as_one_after_the_other(engine: CpuEngine, photographs: np.ndarray) -> None:
    images = torch.from_numpy(photographs[[0, 1, 2, 3, 1], :, :96, :128]).float() / 255
    other = create(EngineConfig("cpu", device="cpu"), load_model("tiny-f8"))
    assert isinstance(other, CpuEngine)
    other.threads = None
    engine.threads = engine.threads or DaemonThreads(2, "codec")
    indices = other.encode(images)
    pictures = other.decode(indices)
    for _ in range(10):
        assert torch.equal(engine.encode(images), indices)
        assert torch.equal(engine.decode(indices), pictures)
    assert not engine.encode(images).requires_grad


def test_upsampling_folded_into_its_convolution_is_the_same_function() -> None:
    torch.manual_seed(0)
    upsample = Upsample(32).requires_grad_(False)
    x = torch.randn(2, 32, 5, 3)
    assert torch.allclose(TransposedUpsample(upsample)(x), upsample(x), atol=1e-5)


@pytest.mark.parametrize("attention", [(), (64,)])
def test_decoder_of_another_geometry(attention: tuple[int, ...]) -> None:
    """Groups of one channel and of several, shortcuts, attention between the blocks."""
    torch.manual_seed(0)
    spec = CodecSpec(
        "toy",
        ch=32,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        attn_resolutions=attention,
        codebook_size=64,
        latent_dim=4,
    )
    model = VQGAN(spec).eval().requires_grad_(False)
    z = torch.randn(1, 4, 5, 7)
    assert torch.allclose(FastDecoder(model)(z), model.pictures(z), atol=1e-4)


def test_the_model_handed_in_stays_as_it_was(engine: CpuEngine) -> None:
    fresh = load_model("tiny-f8")
    weights = fresh.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in engine.model.state_dict().items())
    assert engine.model.decoder.conv_in.weight.is_contiguous()


def test_the_base_of_a_step_is_decoded_as_published() -> None:
    model = load_model("tiny-f8")
    tokens = torch.randint(0, 16384, (2, 12, 12), generator=torch.Generator().manual_seed(0))
    ours, reference = (create(EngineConfig(name, device="cpu"), model) for name in ("cpu", "reference"))
    each = torch.cat([reference.decode(one) for one in torch.split(tokens, 1)])
    assert torch.equal(ours.decode(tokens, exact=True), each)
    assert not torch.equal(ours.decode(tokens), each)
    assert torch.allclose(ours.decode(tokens), each, atol=1e-4)


def test_norm_of_a_large_mean_does_not_cancel() -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 128, 12, 12) + 300).contiguous(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(32, 128, eps=1e-6)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 32, eps=1e-6))
    assert (norm_silu(x, norm) - expected).abs().max() < 1e-3
    assert (Norm(128)(x) - torch.nn.functional.group_norm(x.double(), 32, eps=1e-6)).abs().max() < 1e-3


def test_overflow_is_an_error_and_never_a_picture() -> None:
    broken = Discretizer.from_store("tiny-f8", EngineConfig("cpu", device="cpu"))
    assert isinstance(broken.engine, CpuEngine)
    image = np.zeros((1, 3, 16, 16), np.uint8)
    broken.engine.decoder.decoder.conv_out.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(EngineError, match=r"images \[0\].*not finite"):
        broken.discretize(image)
    broken.engine.model.encoder.conv_out.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(EngineError, match="latent"):
        broken.discretize(image)


def test_what_auto_picks() -> None:
    model = load_model("tiny-f8")
    assert create(EngineConfig("auto", device="cpu"), model).name == "cpu"
    assert create(EngineConfig("auto", device="cpu", dtype="bf16"), model).name == "torch"
    assert Discretizer.from_store("tiny-f8", EngineConfig(device="cpu")).engine.describe()["engine"] == "cpu"


@pytest.mark.parametrize(("device", "dtype", "says"), [("meta", "auto", "meta"), ("cpu", "bf16", "fp32")])
def test_what_it_is_not_for(device: str, dtype: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create(EngineConfig("cpu", device=device, dtype=dtype), load_model("tiny-f8"))
