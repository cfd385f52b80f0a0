"""`dat bench codec` on small images: what it measures is not judged, only that it does and how it reports it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dat_service.bench.codec import choose_engines
from dat_service.cli.main import app

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
