"""`dat bench codec` on small images: what it measures is not judged, only that it does and how it reports it."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dat_service.bench import codec as bench_codec
from dat_service.bench.codec import choose_engines
from dat_service.cli.main import app
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create

SMALL = ["--batch", "2", "--size", "64", "--rounds", "2"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "codec", "--device", "cpu", *arguments])


def test_engines_are_measured_beside_the_reference(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = run(*SMALL, "--engine", "cpu", "--engine", "reference", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "building reference fp32" in result.stderr
    heading, *lines = result.stdout.splitlines()[1:]
    assert "x reference" in heading
    assert {line.split()[0] for line in lines} == {"reference", "cpu"}
    rows = {row["engine"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["reference fp32", "cpu fp32"]
    assert rows["reference fp32"]["times_reference"] == 1
    for row in rows.values():
        assert row["token_agreement"] == 1
        assert len(row["images_per_s"]) == 2
        assert min(row["images_per_s"]) > 0


def test_on_cuda_few_engines_are_there_at_a_time_and_the_reference_is_a_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each holds 10 GB or more with its graphs, and the reference's convolutions may round coarsely on a GPU."""
    alive: weakref.WeakSet[Engine] = weakref.WeakSet()
    most = 0
    references: list[str] = []

    def create_and_count(config: EngineConfig, model: VQGAN) -> Engine:
        nonlocal most
        if config.dtype == "fp16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        engine = create(replace(config, engine="torch", device="cpu"), model)
        alive.add(engine)
        most = max(most, len(alive))
        return engine

    def reference_engine(model: VQGAN) -> Engine:
        references.append("cpu")
        engine = create(EngineConfig("torch", "cpu"), model)
        model.encoder.conv_out.bias.add_(0.5)  # so that its tokens differ from those of the reference "on CUDA"
        return engine

    monkeypatch.setattr(bench_codec, "pick_device", torch.device)
    monkeypatch.setattr(bench_codec, "create", create_and_count)
    monkeypatch.setattr(bench_codec, "reference_engine", reference_engine)
    pairs = [("torch", "fp32"), ("torch", "mixed"), ("reference", "fp32"), ("onnx", "fp32"), ("torch", "fp16")]
    rows = bench_codec.measure("tiny-f8", pairs, batch=3, size=32, device="cuda", rounds=2)
    assert most == 3  # the reference and two others
    assert references == ["cpu"]
    assert {row.engine: row.error for row in rows} == {
        "reference fp32": None, "torch fp32": None, "torch mixed": None, "onnx fp32": None,
        "torch fp16": "OutOfMemoryError: CUDA out of memory",
    }  # fmt: skip
    measured = [row for row in rows if not row.error]
    assert all(len(row.images_per_s) == 2 and row.times_reference is not None for row in measured)
    assert all(row.token_agreement is not None and row.token_agreement < 0.9 for row in measured)


def test_an_engine_that_cannot_run_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    result = run(*SMALL, "--engine", "onnx", "--engine", "cpu")
    assert result.exit_code == 0, result.output
    assert "onnx fp32  not measured: RuntimeError: " in result.stdout
    assert result.stdout.count("–") == 2  # no reference to compare with
    failed = run(*SMALL, "--engine", "onnx")
    assert failed.exit_code == 1


def test_half_precision_on_a_cpu_must_be_named() -> None:
    cpu = torch.device("cpu")
    assert {dtype for _, dtype in choose_engines(cpu, [], [])} == {"fp32"}
    assert choose_engines(cpu, ["torch"], ["bf16"]) == [("torch", "bf16")]
    assert ("torch", "mixed") in choose_engines(torch.device("cuda"), [], [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "onyx"], "onyx is not usable; expected any of reference fp32, torch fp32"),
        (["--out", "/none/r.json"], "--out: /none/r.json is not usable; expected a file in a folder that exists"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--codec", "no-such-codec"], "no-such-codec"),
        (["--images", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert len([line for line in result.stderr.splitlines() if "building" not in line]) == 1
