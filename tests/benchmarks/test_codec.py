"""`python -m benchmarks.codec` on small images: not how fast, but that it measures and how it reports."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.codec import __main__ as codec
from benchmarks.codec import cell, roofline
from benchmarks.codec.contestants import Candidate, Codec, candidates, engine_candidate
from dat_service.bench.timing import Timing
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.registry import REGISTRY
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import load_model
from tests.conftest import ROOT

CPU = torch.device("cpu")
VQ_F8 = REGISTRY["vqgan-openimages-f8-16384"]
SMALL = CodecSpec(
    "small", ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(64,), codebook_size=64, latent_dim=4
)


def plan(operations: tuple[str, ...] = ("q",)) -> cell.Plan:
    return cell.Plan(CPU, operations, 2, 1, "taming fp32", {"fp32": 1e9}, lambda line: None)


def test_timings_become_rates() -> None:
    assert cell.rates(Timing((), 0, "ZeroDivisionError"), 4) == {"error": "ZeroDivisionError"}
    assert cell.rates(Timing((1.0, 2.0, 4.0), 1), 8) == {
        "images_per_s": 4.0, "low": 2.0, "high": 8.0, "rounds": [8.0, 4.0, 2.0], "calls_a_round": 1,
    }  # fmt: skip


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    arguments = ["--batch", "1", "--size", "64", "--rounds", "2", "--warmup", "1", "--steps", "--threads", "1"]
    wanted = ["--contestants", "torch fp32,taming*", "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        assert codec.main([*arguments, *wanted]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(out.read_text())
    assert results["command"].startswith("python -m benchmarks.codec --batch 1 ")
    assert results["machine"]["torch"] == torch.__version__
    assert results["codec"]["weights"].startswith("fingerprint ae675ccec0c9")
    assert results["matmul_peak_flops"]["fp32"] > 1e8
    (only,) = results["cells"]
    assert (only["size"], only["batch"], only["baseline"]) == (64, 1, "taming fp32")
    rows = {row["contestant"]: row for row in only["results"]}
    assert list(rows) == ["torch fp32", "taming fp32"]
    for row in rows.values():
        assert row["token_agreement"] == 1
        assert row["finite"] is True
        assert 0 < row["q"]["low"] <= row["q"]["images_per_s"] <= row["q"]["high"]
        assert len(row["q"]["rounds"]) == 2
        assert 0 < row["q"]["share_of_peak"] < 2
        assert row["encode"]["images_per_s"] > row["q"]["low"]
    assert rows["taming fp32"]["q"]["times_baseline"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "host" in rows["torch fp32"]
    assert "host" not in rows["taming fp32"]
    assert [row["tricks"] for row in results["steps"]["rows"]][:2] == ["none", "channels_last"]
    assert results["steps"]["not_measured"] == "no CUDA"
    captured = capsys.readouterr()
    assert "x taming fp32" in captured.out
    assert "not measured: no CUDA" in captured.out
    assert "1 of 1 cells done" in captured.err
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_contestant_that_fails_does_not_end_the_run() -> None:
    def no_memory(model: VQGAN, shape: torch.Size) -> Codec:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def absent(model: VQGAN, shape: torch.Size) -> Codec:
        raise ImportError("No module named 'diffusers'")

    model = load_model("tiny-f8")
    runners = [
        Candidate("full", "fp16", no_memory),
        Candidate("diffusers fp32", "fp32", absent),
        engine_candidate("torch", "fp32", CPU),
    ]
    pool = cell.Pool(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), None)
    done = cell.run_cell(model, runners, pool, 2, plan())
    full, diffusers, ours = done["results"]
    assert full["error"] == "OutOfMemoryError: CUDA out of memory"
    assert diffusers["error"] == "not installed (No module named 'diffusers')"
    assert (
        ours["q"]["times_baseline"]["median"] == 1.0
    )  # the baseline did not run: the first that did takes its place
    assert done["baseline"] == "torch fp32"
    assert "token_agreement" not in ours


def test_contestants_are_chosen_by_pattern() -> None:
    names = [c.name for c in candidates(CPU)]
    assert "torch fp32" in names
    assert "taming fp32" in names
    assert "diffusers fp32 compiled" in names
    assert not [n for n in names if "16" in n]
    assert [c.name for c in candidates(CPU, ["torch bf*", "taming *"])] == ["torch bf16", "taming fp32"]
    on_cuda = {c.name for c in candidates(torch.device("cuda"))}
    assert {"torch fp16", "taming tf32", "taming fp16 autocast", "diffusers fp16 compiled"} <= on_cuda


@pytest.mark.parametrize("spec", [SMALL, REGISTRY["tiny-f8"]], ids=lambda spec: spec.name)
def test_diffusers_returns_the_same_images(spec: CodecSpec, photographs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        pytest.importorskip("diffusers")
        from benchmarks.codec.contestants import diffusers_candidate

        torch.manual_seed(0)
        model = load_model("tiny-f8") if spec.name == "tiny-f8" else VQGAN(spec).eval().requires_grad_(False)
        images = torch.from_numpy(photographs[:1, :, :64, :64]).float() / 255
        theirs = diffusers_candidate("fp32", CPU).build(model, images.shape)
        tokens = model.encode(images * 2 - 1)
        assert (
            theirs.encode(images) == tokens
        ).float().mean() > 0.98  # its attention and distances round otherwise
        assert (theirs.decode(tokens) - (model.decode(tokens) + 1) / 2).abs().max() < 1e-4


def test_flop_of_the_published_codec() -> None:
    counted = roofline.flop(VQ_F8, 224)
    assert counted["encode"] == pytest.approx(172e9, rel=0.005)
    assert counted["decode"] == pytest.approx(360e9, rel=0.005)


def test_the_roofline_counts_the_same_flop_and_no_trick_costs() -> None:
    counted = sum(roofline.flop(VQ_F8, 224).values())
    for dtype in roofline.DTYPES:
        kernels = roofline.kernels(VQ_F8, 224, (), dtype)
        assert sum(k.flop for k in kernels) == pytest.approx(counted, rel=0.001)
        none = roofline.predict(VQ_F8, 224, 64, (), roofline.H200, dtype)
        everything = roofline.predict(VQ_F8, 224, 64, roofline.TRICKS, roofline.H200, dtype)
        least = 64 * counted * 4 / 9 / roofline.H200.half
        assert least < everything < none
        if dtype in ("fp16", "bf16"):  # in fp32, convolutions take NCHW as it is, and the norms copy NHWC
            for trick in roofline.TRICKS:
                assert roofline.predict(VQ_F8, 224, 64, (trick,), roofline.H200, dtype) <= none


def test_the_roofline_knows_which_half_is_fp32() -> None:
    """By hand for an H200: the encoder's 172 GFLOP at 0.7 · 67 TFLOP/s are 3.7 ms, so `mixed` is below 270 Q/s."""
    rates = {d: 64 / roofline.predict(VQ_F8, 224, 64, roofline.TRICKS, roofline.H200, d) for d in roofline.DTYPES}
    assert rates["fp32"] < rates["mixed"] < rates["split"] < rates["fp16"] == rates["bf16"]
    assert 165 <= rates["mixed"] <= 215
    assert rates["mixed"] < rates["tf32"] < rates["fp16"]
    work = {d: roofline.kernels(VQ_F8, 224, roofline.TRICKS, d) for d in ("mixed", "split", "fp16")}
    fp32 = sum(k.flop for k in work["mixed"] if k.arithmetic.unit == "fp32")
    assert fp32 == pytest.approx(roofline.flop(VQ_F8, 224)["encode"], rel=0.03)
    assert sum(k.flop for k in work["split"] if k.arithmetic.products == 3) == pytest.approx(fp32, rel=0.05)
    assert sum(k.flop for k in work["fp16"] if k.arithmetic.unit == "fp32") < 0.02 * fp32


def test_the_share_of_the_peak_of_mixed_has_two_peaks() -> None:
    model = load_model("tiny-f8")
    flop = roofline.flop(model.spec, 64)
    peaks = {"fp32": 1e12, "fp16": 8e12, "bf16": None}
    least = {o: cell.least_seconds(model, 64, o, "mixed", peaks) for o in cell.OPERATIONS}
    assert least["encode"] == pytest.approx(flop["encode"] / 1e12)
    assert least["decode"] == pytest.approx(flop["decode"] / 8e12)
    assert least["q"] == pytest.approx(flop["encode"] / 1e12 + flop["decode"] / 8e12)
    assert least["host"] is None
    assert cell.least_seconds(model, 64, "q", "fp32", peaks) == pytest.approx(sum(flop.values()) / 1e12)
    assert cell.least_seconds(model, 64, "q", "bf16", peaks) is None
    assert engine_candidate("torch", "mixed", CPU).precision == "mixed"


def test_peaks_are_measured() -> None:
    assert machine.matmul_peak(CPU, "fp32", side=64) > 1e6
    assert machine.launch_s(CPU) > 0
    memory = machine.PeakMemory(CPU)
    memory.start()
    block = torch.ones(1 << 24)
    assert (memory.peak() or block.nbytes) >= 0.9 * block.nbytes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "60"], "multiples of f = 8"),
        (["--operations", "fly"], "fly"),
        (["--geometry", "vq-f9"], "vq-f9"),
        (["--contestants", "tortoise"], "tortoise"),
        (["--batch", "0"], "1 or more"),
        (["--codec", "no-such-codec"], "no-such-codec"),
    ],
)
def test_wrong_arguments_are_reported(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert codec.main(["--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("benchmarks.codec: ")


def test_random_weights_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    """On a GPU machine without safetensors, Pillow, Ray, typer, rich, taming or diffusers."""
    out = tmp_path / "r.json"
    absent = "PIL safetensors platformdirs ray typer rich fastapi pydantic taming diffusers matplotlib skimage"
    flags = "--geometry tiny-f8 --device cpu --batch 1 --size 64 --rounds 1 --warmup 1 --threads 1 --contestants"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}.split()));"
        "from benchmarks.codec.__main__ import main;"
        f"sys.exit(main([*{flags!r}.split(), 'torch fp32,taming*,diffusers fp32 eager', '--out', {str(out)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["codec"] == {"name": "tiny-f8", "weights": "random weights"}
    assert results["reference"] == "none (random weights): token agreement not taken"
    rows = {row["contestant"]: row for row in results["cells"][0]["results"]}
    assert "token_agreement" not in rows["torch fp32"]
    assert rows["torch fp32"]["q"]["images_per_s"] > 0
    assert rows["taming fp32"]["error"].startswith("not installed (")
    assert rows["diffusers fp32 eager"]["error"].startswith("not installed (")
    assert not out.with_suffix(".png").exists()
