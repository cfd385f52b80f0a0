"""`dat codecs verify`: fidelity, the table, which engine it chooses, its status, and the layer that overflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dat_service.cli.main import app
from dat_workers.codecs.store import load_model
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.verify.agreement import Agreement, encode, jaccard, judge, measure, stand_in_gradients
from dat_workers.verify.diagnose import find_overflow
from dat_workers.verify.survey import Row, fastest, judged, survey

GOOD = Agreement(1.0, 100.0, 1e-6, 0, False, 1.0, 1.0)


@pytest.fixture(scope="module")
def images(photographs: np.ndarray) -> Tensor:
    """fp32 [2,3,64,64]."""
    return torch.from_numpy(photographs[:2, :, 80:144, 80:144]).float() / 255


def test_jaccard() -> None:
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a, a) == 1
    assert jaccard(a & ~a, a & ~a) == 1


def test_fidelity_is_one_for_the_same_codec_and_falls_with_bf16(images: Tensor) -> None:
    model = load_model("tiny-f8")
    reference = create(EngineConfig("reference", device="cpu"), model)
    yardstick = measure(reference, images, lambda q: 30 * stand_in_gradients(q))
    assert yardstick.changed is not None
    assert yardstick.changed.any()
    exact = judge(create(EngineConfig("torch", device="cpu"), load_model("tiny-f8")), yardstick)
    assert (exact.token_agreement, exact.fidelity, exact.own_fidelity) == (1, 1, 1)
    assert exact.passed
    half = judge(create(EngineConfig("torch", device="cpu", dtype="bf16"), load_model("tiny-f8")), yardstick)
    assert half.fidelity is not None
    assert half.fidelity < 0.9
    assert "fidelity" in half.shortfall


def test_stand_in_gradients_are_the_same_every_time(images: Tensor) -> None:
    g = stand_in_gradients(images)
    assert torch.equal(g, stand_in_gradients(images))
    assert g.shape == images.shape
    assert (g.flatten(1).norm(dim=1) > 0).all()
    assert torch.allclose(g[1:], stand_in_gradients(images[1:]), rtol=1e-3, atol=1e-9)


class Overflowing:
    """An engine whose encoder overflows on the image that begins with a white pixel, and whose pictures are NaN."""

    name, device, dtype, batch = "overflowing", torch.device("cpu"), "fp16", 4

    def encode(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 8, 8, dtype=torch.int64) - (images[:, 0, 0, 0] == 1).int()[:, None, None]

    def decode(self, indices: Tensor) -> Tensor:
        return torch.full((len(indices), 3, 64, 64), torch.nan)


def test_images_that_overflow_are_counted_one_by_one(images: Tensor) -> None:
    marked = images.clone() * 0.5
    marked[1, 0, 0, 0] = 1
    tokens = encode(Overflowing(), marked)
    assert (tokens[0] == 0).all()
    assert (tokens[1] == -1).all()
    reference = create(EngineConfig("reference", device="cpu"), load_model("tiny-f8"))
    agreement = judge(Overflowing(), measure(reference, marked, stand_in_gradients))
    assert agreement.non_finite == 2
    assert not agreement.passed
    assert "2 pictures are not finite" in agreement.shortfall
    assert np.isnan(agreement.psnr_db)
    json.dumps(Row("overflowing", "fp16", False, agreement).to_dict(), allow_nan=False)


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
    assert 0 < found.largest < 65504
    assert find_overflow(load_model("tiny-f8"), images[:1], tokens[:1], device="cpu", dtype="fp16") is None


def test_the_table_names_the_layer_and_the_default(images: Tensor) -> None:
    model = load_model("tiny-f8")
    model.decoder.up[1].block[0].conv1.weight.mul_(1e6)
    yardstick = measure(create(EngineConfig("reference", device="cpu"), model), images[:1])
    rows = survey(model, yardstick, device="cpu", engines=["torch", "auto"], dtypes=["auto", "fp16"], rounds=1)
    found = [(row.name, row.default) for row in rows]
    assert found == [("torch fp32", False), ("torch fp16", False), ("cpu fp32", True), ("cpu fp16", False)]
    assert rows[3].error is not None
    assert rows[0].overflow is None
    assert rows[1].overflow is not None
    assert "decoder.up.1.block.0.conv1" in rows[1].overflow
    assert rows[1].agreement is not None
    assert rows[1].agreement.non_finite == 1
    assert rows[0].images_per_s


def test_the_fastest_that_passes_is_chosen() -> None:
    rows = [
        Row("torch", "fp32", True, GOOD, 10.0),
        Row("torch", "fp16", False, Agreement(0.999, 60.0, 1e-3, 0, True, 0.5, 0.1), 90.0),
        Row("torch", "bf16", False, Agreement(0.996, 60.0, 1e-3, 0, True, 0.96, 0.1), 50.0),
        Row("onnx", "fp32", False, error="not installed"),
    ]
    best = fastest(rows)
    assert best is not None
    assert best.name == "torch bf16"
    assert fastest(rows[1:2] + rows[3:]) is None
    assert judged(rows, engines=False, dtypes=False) == rows[:1]
    assert judged(rows, engines=True, dtypes=True) == rows
    missing = [Row("onnx", "fp32", False, error="RuntimeError: needs: pip install 'dat-service[onnx]'")]
    assert judged(rows + missing, engines=False, dtypes=True) == rows
    assert judged(rows + missing, engines=True, dtypes=True) == rows + missing
    assert rows[3].shortfall == "not installed"


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


def test_what_cannot_be_here_does_not_fail_what_can() -> None:
    assert "torch mixed: PASS" in run("--dtype", "mixed").stdout
    assert "cpu fp32: PASS" in run("--engine", "cpu").stdout


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\0" * 18])
def test_files_that_hold_no_gradients_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "g.npy"
    file.write_bytes(content)
    said = run("--gradients", str(file), status=1)
    assert "--gradients" in said.output


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
    [(["--dtype", "fp8"], "fp8"), (["--engine", "onyx"], "onyx"), (["--crop", "60"], "multiple of f = 8")],
)
def test_command_refuses(arguments: list[str], says: str) -> None:
    assert says in run(*arguments, status=1).stderr
