"""The predicted memory of a batch, against the tensors that exist while it runs (on a CPU)."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dat_service.settings import Settings
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.registry import REGISTRY
from dat_workers.codecs.spec import CodecSpec
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.identity import IdentityEngine
from dat_workers.engines.torch import memory, network
from dat_workers.engines.torch.engine import TorchEngine
from dat_workers.engines.torch.memory import FIXED_BYTES, Fit, MemoryPlan, fit
from dat_workers.engines.torch.tricks import Tricks
from dat_workers.errors import OutOfMemory, TooLarge

CPU = torch.device("cpu")
F8: dict[str, Any] = {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,), "latent_dim": 4}
SMALL = CodecSpec("small", ch=32, num_res_blocks=2, codebook_size=256, **F8)
WIDE_CODEBOOK = CodecSpec(
    "wide-codebook", ch=32, ch_mult=(1, 1), num_res_blocks=1, codebook_size=4096, latent_dim=4
)
ATTENTION = CodecSpec(
    "attention", ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), codebook_size=64, latent_dim=4
)
VQ_F8 = REGISTRY["vqgan-openimages-f8-16384"]
ALL = Tricks.parse("all", cuda=True)
GB = 1_000_000_000


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, from their creation until their memory is freed."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        self._add(first)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms allocate what their kernel allocates on CUDA; values do not matter here."""
    plain = network.FastNorm.forward

    def forward(norm: network.FastNorm, x: Tensor) -> Tensor:
        if not norm.fused:
            return plain(norm, x)
        return torch.zeros_like(x, dtype=norm.dtype, memory_format=torch.channels_last)

    monkeypatch.setattr(network.FastNorm, "forward", forward)


def peaks(engine: TorchEngine, images: int, height: int, width: int) -> tuple[int, int]:
    """Returns the most bytes of tensors that existed at a time while images were encoded, and decoded."""
    x = torch.rand(images, 3, height, width)
    with LiveTensors(x) as encoding:
        tokens = engine.encode(x)
    with LiveTensors(tokens) as decoding:
        engine.decode(tokens)
    return encoding.peak, decoding.peak


@pytest.mark.usefixtures("kernels_on_a_cpu")
@pytest.mark.parametrize("dtype", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize(
    ("spec", "tricks"),
    [
        (SMALL, "none"),
        (SMALL, "all"),
        (SMALL, "all,-fused_norm"),
        (SMALL, "all,-folded_upsample"),
        (SMALL, "all,-channels_last"),
        (ATTENTION, "all"),
        (ATTENTION, "all,-sdpa"),
        (WIDE_CODEBOOK, "all,-fused_codebook"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_prediction_is_what_exists(
    spec: CodecSpec, tricks: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "DISTANCES", 1 << 22)  # a CPU's search computes fewer at a time
    engine = TorchEngine(VQGAN(spec), CPU, dtype, tricks)
    plan = MemoryPlan(spec, dtype, engine.tricks, 0)
    size = (2, 64, 96)
    for predicted, counted in zip(plan.activations(*size), peaks(engine, *size), strict=True):
        assert counted <= predicted <= 1.06 * counted


@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_memory_grows_with_images_and_pixels() -> None:
    engine = TorchEngine(VQGAN(SMALL), CPU, "mixed", "all")
    plan = MemoryPlan(SMALL, "mixed", engine.tricks, 0)
    for size in ((1, 32, 32), (3, 32, 32), (1, 128, 64)):
        for predicted, counted in zip(plan.activations(*size), peaks(engine, *size), strict=True):
            assert counted <= predicted <= 1.01 * counted


def test_the_published_codec_by_hand() -> None:
    """vq-f8 at 224²: in fp32 128 channels four times and two images; in fp16 256 channels twice and 128 once."""
    pixels = 224 * 224
    encode, decode = MemoryPlan(VQ_F8, "mixed", ALL, 0).activations(64, 224, 224)
    assert encode == 64 * pixels * (3 * 128 * 4 + 2 * 3 * 4)
    assert decode == pytest.approx(64 * pixels * (2 * 256 + 128) * 2, rel=0.001)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "mixed", "fp16", "bf16"])
@pytest.mark.parametrize("side", [224, 256, 512])
def test_batches_of_1_64_and_128(dtype: str, side: int) -> None:
    plan = MemoryPlan(VQ_F8, dtype, ALL, 0)
    one, many, most = (plan.needed(images, side, side) for images in (1, 64, 128))
    assert many == pytest.approx(64 * one, rel=1e-6)
    assert most == pytest.approx(128 * one, rel=1e-6)
    assert one == pytest.approx(plan.needed(1, 224, 224) * (side / 224) ** 2, rel=1e-6)


def test_the_default_takes_less_than_12_gb() -> None:
    assert MemoryPlan(VQ_F8, "mixed", ALL, 196_000_000).needed(64, 224, 224) < 12 * GB


@pytest.mark.parametrize(
    ("gb", "share", "batch"),
    [(141, 1.0, 64), (141, 0.5, 64), (24, 1.0, 64), (24, 0.5, 32), (24, 0.25, 16), (8, 1.0, 32)],
)
def test_a_replica_takes_what_its_share_allows(gb: int, share: float, batch: int) -> None:
    plan = MemoryPlan(VQ_F8, "mixed", ALL, 196_000_000)
    found = fit(plan, gb * GB, share)
    assert found.batch == batch
    budget = gb * GB * share - FIXED_BYTES
    assert plan.needed(found.batch, 224, 224) <= budget
    assert plan.needed(1, found.side, found.side) <= budget
    assert found.side % 8 == 0
    assert found.side > 500


@pytest.mark.parametrize(("share", "fractions"), [(1.0, []), (0.5, [0.5])])
def test_the_engine_takes_the_batch_that_fits_and_no_more_memory(
    share: float, fractions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(VQGAN(SMALL), CPU, "fp32", "all")
    limits: list[float] = []
    properties = SimpleNamespace(total_memory=3 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: limits.append(part))
    engine._fit_memory(share)
    weights = sum(p.numel() * 4 for p in VQGAN(SMALL).parameters())
    found = fit(MemoryPlan(SMALL, "fp32", engine.tricks, weights), 3 * GB, share)
    assert (engine.batch, engine.most_pixels) == (found.batch, pytest.approx(found.side**2, rel=0.02))
    assert engine.batch == (32 if share == 1 else 8)
    assert limits == fractions


@pytest.mark.parametrize(("gpus", "share"), [(None, 1.0), (0.5, 0.5), (1, 1.0), (2, 1.0), (0, 1.0)])
def test_gpus_below_1_are_a_share_of_the_memory(gpus: float | None, share: float) -> None:
    assert Settings(gpus=gpus).engine_config.gpu_share == share


def test_too_little_memory_for_one_image_is_an_error_with_the_figures() -> None:
    with pytest.raises(OutOfMemory, match=r"vqgan-openimages-f8-16384 in fp32 needs about 1\.\d GB.*has 1\.2 GB"):
        fit(MemoryPlan(VQ_F8, "fp32", ALL, 282_000_000), 12 * GB, 0.1)


def test_images_that_do_not_fit_are_refused_with_the_size_that_does() -> None:
    engine = IdentityEngine()
    engine.most_pixels = 64 * 64
    discretizer = Discretizer(SMALL, "f", engine)
    discretizer.prepare(np.zeros((1, 3, 64, 64), np.uint8))
    discretizer.prepare(np.zeros((1, 3, 32, 121), np.uint8))  # padded to 128
    with pytest.raises(
        TooLarge, match=r"images: 129x32 pixels .*at most 4096 pixels for each image, such as 64x64"
    ):
        discretizer.prepare(np.zeros((1, 3, 32, 129), np.uint8))
    discretizer.prepare_decode(np.zeros((1, 8, 8), np.uint16))
    with pytest.raises(TooLarge, match="indices: 72x64 pixels"):
        discretizer.prepare_decode(np.zeros((1, 8, 9), np.uint16))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(ValueError, match=f"gpu_share is {share}"):
        EngineConfig(gpu_share=share)


def test_the_example_of_the_docstring() -> None:
    plan = MemoryPlan(VQ_F8, "mixed", ALL, int(196e6))
    assert round(plan.needed(64, 224, 224) / 1e9, 1) == 6.3
    assert fit(plan, 24 << 30, 0.5) == Fit(batch=32, side=1784)
