"""`dat codecs verify`: the table, which engine it chooses, and its status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dat_service.cli.main import app
from dat_workers.engines.config import EngineConfig
from dat_workers.verify.agreement import Agreement
from dat_workers.verify.survey import Row


def run(*arguments: str, status: int = 0) -> Any:
    fixed = ["codecs", "verify", "tiny-f8", "--device", "cpu", "--crop", "64", "--limit", "2"]
    result = CliRunner().invoke(app, [*fixed, *arguments])
    assert result.exit_code == status, result.output
    return result


def test_command_passes_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "v.json"
    said = run("--engine", "auto", "--dtype", "auto", "--json", str(file)).stdout
    assert "cpu fp32: PASS" in said
    assert "the fastest that passes: cpu fp32" in said
    assert "untrained convolutional classifier, seed 0 (a stand-in" in said
    facts = json.loads(file.read_text())
    assert facts["tokens"] == 128
    assert facts["fastest_that_passes"] == "cpu fp32"
    (row,) = facts["rows"]
    assert (row["engine"], row["dtype"], row["default"], row["shortfall"]) == ("cpu", "fp32", True, "")
    assert row["agreement"]["token_agreement"] == 1
    assert row["images_per_s"] > 0


def test_the_reference_runs_on_the_cpu_whatever_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuDNN may compute fp32 convolutions by transforms, which round more than what is to be judged."""
    created: list[tuple[str, str]] = []

    class Enough(Exception):
        pass

    def create(config: EngineConfig, model: object) -> None:
        created.append((config.engine, config.device))
        raise Enough

    monkeypatch.setattr("dat_workers.verify.agreement.create", create)
    monkeypatch.setattr("dat_workers.engines.factory.create", create)
    CliRunner().invoke(app, ["codecs", "verify", "tiny-f8", "--device", "cuda", "--crop", "64", "--limit", "1"])
    assert created == [("reference", "cpu")]


def test_what_cannot_be_here_does_not_fail_what_can() -> None:
    assert "torch mixed: PASS" in run("--dtype", "mixed").stdout
    assert "cpu fp32: PASS" in run("--engine", "cpu").stdout


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\0" * 18, b"PK\x03\x04 cut off", b"garbage"])
def test_files_that_hold_no_gradients_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "g.npy"
    file.write_bytes(content)
    said = run("--gradients", str(file), status=1)
    assert "is not usable; expected a readable .npy file of numbers" in said.stderr


def test_command_fails_for_what_was_asked_and_falls_short() -> None:
    said = run("--dtype", "bf16", status=1).stdout
    assert "torch bf16: FAIL: token agreement" in said
    assert "the fastest that passes: none" in said


@pytest.mark.parametrize(("fidelity", "status"), [(0.96, 0), (0.94, 1)])
def test_command_without_names_is_decided_by_the_default(
    fidelity: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Row("torch", "fp16", True, Agreement(0.996, 60.0, 1e-3, 0, True, fidelity, 0.1), 90.0)
    other = Row("torch", "bf16", False, Agreement(0.9, 60.0, 1e-3, 0, True, 0.1, 0.1), 95.0)
    absent = Row("onnx", "fp32", False, error="not installed")
    broken = Row(
        "onnx", "fp16", False, Agreement(0.0, float("nan"), float("nan"), 2, True, 0.0, 0.0), 1.0, "x.conv1"
    )
    monkeypatch.setattr("dat_workers.verify.survey.survey", lambda *a, **k: [default, other, absent, broken])
    said = run(status=status).stdout
    assert f"the fastest that passes: {'none' if status else 'torch fp16'}" in said
    assert "not run: not installed" in said
    assert "onnx fp16 overflows in x.conv1" in said
    assert said.count("PASS") + said.count("FAIL") == 1


def test_command_takes_gradients_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "g.npy"
    np.save(path, np.ones((2, 3, 64, 64), np.float32))
    said = run("--dtype", "fp32", "--gradients", str(path)).stdout
    assert "gradients g.npy" in said
    np.save(path, np.ones((2, 3, 32, 32), np.float32))
    assert "[2, 3, 64, 64]" in run("--gradients", str(path), status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dtype", "fp8"], "fp8"),
        (["--engine", "onyx"], "onyx"),
        (["--crop", "60"], "multiple of f = 8"),
        (["--json", "/"], "--json: / is not usable"),
        (["--json", "/none/v.json"], "a folder that exists"),
    ],
)
def test_command_refuses(arguments: list[str], says: str) -> None:
    assert says in run(*arguments, status=1).stderr


def test_too_few_tokens_are_not_called_falling_short(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(
        "cpu", "fp32", True, Agreement(127 / 128, 90.0, 1e-3, 0, False, 1.0, 1.0, tokens=128, changed=50), 1.0
    )
    monkeypatch.setattr("dat_workers.verify.survey.survey", lambda *a, **k: [row])
    printed = run(status=1).stdout
    assert (
        "cpu fp32: TOO FEW TOKENS: token agreement 99.2188%, must be at least 99.99%: 128 tokens are too few"
        in printed
    )
    assert "name some after the codec, with --limit 157" in printed  # 2 pictures had 128 tokens; it takes 10,000
    assert "falls short" not in printed
    assert "the fastest that passes: none" in printed
