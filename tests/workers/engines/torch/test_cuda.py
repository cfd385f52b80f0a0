"""The CUDA engine, which nothing else in the tests runs.

On a machine with a GPU:

    python -m pytest tests/workers/engines/torch/test_cuda.py

or, where only torch, triton, numpy and pytest are installed (--noconftest), with client and workers on PYTHONPATH:

    python -m pytest -c /dev/null --rootdir . --noconftest tests/workers/engines/torch/test_cuda.py

Weights are random and images are noise: fp32 is held to fp32, half precision to bounds that a wrong kernel would
pass by far. They say nothing of a codec's fidelity; that is `dat codecs verify`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecSpec
from dat_workers.discretizer import Discretizer
from dat_workers.engines.base import Engine
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.device_copies import DeviceBatch, run_on_device
from dat_workers.engines.device_errors import free_cached_memory
from dat_workers.engines.factory import create
from dat_workers.engines.torch.engine import TorchEngine
from dat_workers.engines.torch.graphs import SIZES
from dat_workers.engines.torch.memory import MemoryPlan
from dat_workers.engines.torch.precision import fix_arithmetic
from dat_workers.engines.torch.tricks import Tricks
from dat_workers.errors import EngineError
from dat_workers.perturbation import Step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")

if torch.cuda.is_available():
    from tests.workers.engines.torch.kernel_checks import *  # noqa: F403  the kernels, on the GPU

EACH = [field.name for field in fields(Tricks)]
F8 = {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,), "latent_dim": 4}
TOY = CodecSpec("toy", ch=32, num_res_blocks=1, codebook_size=512, **F8)
FULL = CodecSpec("full", ch=128, num_res_blocks=2, codebook_size=16384, **F8)
SIDE = 64
OUTPUTS = ("reconstruction", "adversarial", "indices", "adversarial_indices")


def random_model(spec: CodecSpec) -> VQGAN:
    """Random weights; codebook vectors with the mean and spread of the latents of noise."""
    torch.manual_seed(0)
    model = VQGAN(spec).eval().requires_grad_(False)
    z = model.latents(torch.rand(1, 3, SIDE, SIDE) * 2 - 1).transpose(0, 1).flatten(1)
    model.quantize.embedding.weight.copy_(z.mean(1) + torch.randn(spec.codebook_size, spec.latent_dim) * z.std(1))
    return model


def images(n: int, side: int = SIDE) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def engine(spec: CodecSpec = TOY, dtype: str = "fp32", tricks: str = "none", side: int = SIDE) -> TorchEngine:
    made = create(EngineConfig("torch", device="cuda", dtype=dtype, tricks=tricks), random_model(spec))
    assert isinstance(made, TorchEngine)
    made.warm_up(side)
    return made


def discretizer(made: Engine, spec: CodecSpec = TOY) -> Discretizer:
    return Discretizer(spec, "0" * 64, made)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """TOY in fp32 on the CPU: latents, tokens and pictures of five images."""
    fix_arithmetic()
    model, x = random_model(TOY), images(5)
    with torch.inference_mode():
        z = model.latents(x * 2 - 1)
        tokens = model.quantize.nearest(z)
        return {"x": x, "z": z, "tokens": tokens, "pictures": (model.decode(tokens) + 1) / 2}


@pytest.mark.parametrize("tricks", ["none", *EACH, "all", *(f"all,-{name}" for name in EACH)])
def test_each_trick_in_fp32(tricks: str, reference: dict[str, Tensor]) -> None:
    made = engine(tricks=tricks)
    x = reference["x"].cuda()
    with torch.inference_mode():
        z = made.model.latents(x * 2 - 1)
    torch.testing.assert_close(z.cpu(), reference["z"], rtol=1e-3, atol=1e-4)
    tokens = made.encode(x)
    assert tokens.is_cuda
    assert (tokens.cpu() == reference["tokens"]).float().mean() > 0.99
    pictures = made.decode(reference["tokens"].cuda())
    assert pictures.dtype == torch.float32
    torch.testing.assert_close(pictures.cpu(), reference["pictures"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dtype", "far"), [("tf32", 0.01), ("fp16", 0.02), ("bf16", 0.1)])
@pytest.mark.parametrize("tricks", ["none", "all"])
def test_other_precisions_are_near(dtype: str, far: float, tricks: str, reference: dict[str, Tensor]) -> None:
    made = engine(dtype=dtype, tricks=tricks)
    tokens = made.encode(reference["x"].cuda()).cpu()
    assert (tokens == reference["tokens"]).float().mean() > 0.5  # random weights: near-ties are everywhere
    pictures = made.decode(reference["tokens"].cuda()).cpu()
    assert (pictures - reference["pictures"]).abs().max() < far * reference["pictures"].abs().max()
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("dtype", ["mixed", "fp16", "bf16"])
def test_full_size(dtype: str) -> None:
    """128 images of 224 x 224: finite or said so, equal with graphs and without, in less memory than predicted."""
    free_cached_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = images(128, 224)
    graphed = engine(FULL, dtype, "all", 224)
    halves = [graphed.encode(part.cuda()) for part in x.split(64)]
    tokens = torch.cat(halves)
    assert tokens.shape == (128, 28, 28)
    assert int(tokens.min()) >= 0
    peaks = [torch.cuda.max_memory_allocated() - before]
    pictures = graphed.decode(tokens[:64])
    peaks.append(torch.cuda.max_memory_allocated() - before)
    assert pictures.isfinite().all()
    assert max(peaks) < 12e9, peaks
    assert torch.cuda.max_memory_reserved() < 12e9
    weights = sum(p.nbytes for p in graphed.model.parameters())
    plan = MemoryPlan(FULL, dtype, graphed.tricks, weights)
    assert torch.cuda.max_memory_reserved() - before < plan.needed(64, 224, 224)
    eager = engine(FULL, dtype, "all,-graphs", 224)
    assert (eager.encode(x[:64].cuda()) == tokens[:64]).float().mean() > 0.99


def test_capture_out_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    """With little memory left to the process, large batches get no graphs, and the engine works all the same."""
    expected = engine(tricks="all,-graphs").encode(images(5, 256).cuda())
    free_cached_memory()
    made = create(EngineConfig("torch", device="cuda", dtype="fp32", tricks="all"), random_model(TOY))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.5e9) / total)
    try:
        made.warm_up(256)
        assert made.batch < 64
        assert "no memory on cuda" in caplog.text
        assert (made.encode(images(5, 256).cuda()) == expected).float().mean() > 0.99
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_fp32_is_not_tf32_whatever_the_process_sets(reference: dict[str, Tensor]) -> None:
    made = engine(tricks="all,-graphs")
    torch.backends.fp32_precision = "tf32"
    try:
        with torch.inference_mode(), made._arithmetic():
            z = made.model.latents(reference["x"].cuda() * 2 - 1).cpu().double()
    finally:
        torch.backends.fp32_precision = "none"
        fix_arithmetic()
    exact = random_model(TOY).double().latents(reference["x"].double() * 2 - 1)
    rms = ((z - exact).square().mean() / exact.square().mean()).sqrt()
    assert rms < 1e-5  # TF32's own error is above 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 33, 64, 65, 100])
def test_graphs_give_what_eager_gives(n: int) -> None:
    """Whole sizes, tails and several pieces; a second batch must not see the first."""
    eager, graphed = engine(tricks="all,-graphs"), engine(tricks="all")
    for x in (images(n).cuda(), 1 - images(n).cuda()):
        expected = eager.encode(x)
        tokens = graphed.encode(x)
        assert (tokens == expected).float().mean() > 0.99
        torch.testing.assert_close(graphed.decode(expected), eager.decode(expected), rtol=1e-3, atol=1e-4)


def test_graphs_of_different_sizes_do_not_disturb_each_other() -> None:
    graphed = engine(tricks="all")
    alone = {n: (graphed.encode(images(n).cuda()), graphed.decode(graphed.encode(images(n).cuda()))) for n in SIZES}
    for n in (64, 1, 8, 2, 64, 32, 1, 16, 4):
        tokens, pictures = alone[n]
        assert torch.equal(graphed.encode(images(n).cuda()), tokens)
        assert torch.equal(graphed.decode(tokens), pictures)


def test_another_size_of_picture_runs_without_a_graph() -> None:
    graphed, eager = engine(tricks="all"), engine(tricks="all,-graphs")
    x = images(3, 96).cuda()
    assert torch.equal(graphed.encode(x), eager.encode(x))


def test_padding_with_bad_images_does_not_spread() -> None:
    graphed = engine(tricks="all")
    bad = images(4).cuda()
    bad[3] = torch.nan
    assert (graphed.encode(bad)[3] == -1).all()
    expected = engine(tricks="all,-graphs").encode(images(3).cuda())
    assert (
        graphed.encode(images(3).cuda()) == expected
    ).float().mean() > 0.99  # row 3 of the graph still holds NaN


def request(n: int, dtype: Any = np.uint8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    levels = rng.integers(0, 256, (n, 3, SIDE, SIDE - 5), np.uint8)
    pictures = levels if dtype == np.uint8 else (levels / 255).astype(dtype)
    gradients = rng.normal(size=levels.shape).astype(np.float16)
    return pictures, gradients, rng.uniform(0.5, 2, n).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_overlap_gives_what_one_after_the_other_gives(n: int, dtype: Any) -> None:
    pictures, gradients, scales = request(n, dtype)
    results = []
    for tricks in ("all,-overlap,-graphs", "all,-graphs"):
        run = discretizer(engine(tricks=tricks))
        for _ in range(3):  # buffers of an earlier run are there to be mixed up
            results.append(run.discretize(pictures, gradients, gradient_scales=scales, outputs=OUTPUTS))
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for name, array in results[0].items():
            assert array.dtype == result[name].dtype
            assert np.array_equal(array, result[name]), name


def test_overlap_under_pressure_mixes_nothing_up() -> None:
    """Many jobs of different sizes, with little to compute: copies run ahead as far as they can."""
    rng = np.random.default_rng(0)
    jobs = [{"x": rng.integers(0, 256, (int(rng.integers(1, 4_000_000)),), np.uint8)} for _ in range(60)]

    def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": 255 - given["x"], "sum": given["x"].sum(dtype=torch.int64)[None]}

    given = [DeviceBatch({"x": [job["x"]]}, compute) for job in jobs]
    for job, result in zip(jobs, run_on_device(torch.device("cuda"), given, overlap=True), strict=True):
        assert int(result["sum"][0]) == int(job["x"].sum(dtype=np.int64))
        assert np.array_equal(result["y"], 255 - job["x"])


@pytest.mark.parametrize("step", [Step(), Step(base="reconstruction", normalize="l2"), Step(normalize="sign")])
def test_the_whole_way_against_the_cpu(step: Step) -> None:
    pictures, gradients, scales = request(5)
    model = random_model(TOY)
    slow = discretizer(create(EngineConfig("torch", device="cpu"), model))
    fast = discretizer(engine(tricks="all"))
    kwargs: dict[str, Any] = {"gradient_scales": scales, "step": step, "outputs": OUTPUTS, "output_dtype": "FP32"}
    expected, result = (d.discretize(pictures, gradients, **kwargs) for d in (slow, fast))
    assert (expected["indices"] == result["indices"]).mean() > 0.99
    assert (expected["adversarial_indices"] == result["adversarial_indices"]).mean() > 0.95
    tokens = expected["indices"]
    assert np.abs(slow.decode(tokens).astype(int) - fast.decode(tokens)).max() <= 1


def test_pixels_are_a_cpus_to_the_last_bit() -> None:
    """Division on CUDA by a number would be a product; the seeds of replaced tokens are made of these bits."""
    from dat_workers.discretizer import as_float

    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(levels.cuda()).cpu(), as_float(levels))


def test_replaced_tokens_are_the_same_everywhere() -> None:
    pictures, _, _ = request(3)
    made = engine(tricks="all")
    d = discretizer(made)
    plain = d.discretize(pictures, outputs=("indices",))["indices"]
    swapped = d.discretize(pictures, replace_fraction=0.25, seed=7, outputs=("adversarial_indices",))
    slow = discretizer(create(EngineConfig("torch", device="cpu"), random_model(TOY)))
    there = slow.discretize(pictures, outputs=("indices",))["indices"]
    also = slow.discretize(pictures, replace_fraction=0.25, seed=7, outputs=("adversarial_indices",))
    changed = plain != swapped["adversarial_indices"]
    assert np.array_equal(changed, there != also["adversarial_indices"])


@pytest.mark.parametrize(("half", "says"), [("decoder", r"images \[0.*not finite"), ("encoder", "latent")])
@pytest.mark.parametrize("tricks", ["none", "all"])
def test_overflow_is_an_error(half: str, says: str, tricks: str) -> None:
    made = engine(tricks=tricks)
    getattr(made.model, half).conv_out.weight[0, 0, 0, 0] = torch.inf  # in place: a graph reads it too
    with pytest.raises(EngineError, match=says):
        discretizer(made).discretize(request(2)[0])


def test_large_offsets() -> None:
    """2^31 elements and more, where 32 bits would wrap."""
    from dat_workers.engines.torch import kernels

    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    size, order = (129, 256, 256, 256), torch.channels_last
    x = torch.empty(size, dtype=torch.float16, device="cuda", memory_format=order).zero_()
    x[-1] = torch.randn(256, 256, 256, device="cuda")
    weight, bias = torch.ones(256, device="cuda"), torch.zeros(256, device="cuda")
    last = kernels.norm_swish(x[-1:], weight, bias, eps=1e-6, swish=True, dtype=torch.float16)
    y = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=True, dtype=torch.float16)
    assert torch.equal(y[-1:], last)
    assert not y[:-1].any()


def test_nearest_of_many_is_chunked_nearest() -> None:
    from dat_workers.engines.torch import kernels

    model = random_model(FULL).cuda()
    z = torch.randn(64, 4, 28, 28, device="cuda") * 0.1
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused = kernels.nearest(flat, model.quantize.embedding.weight).view(64, 28, 28)
    assert torch.cuda.max_memory_allocated() - before < 50e6
    assert (fused == model.quantize.nearest(z)).float().mean() > 0.995
