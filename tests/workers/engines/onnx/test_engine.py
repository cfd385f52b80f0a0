"""The engine on ONNX Runtime."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.engines.onnx import engine
from dat_workers.errors import EngineError
from dat_workers.verify.agreement import compare

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_engine_agrees_with_the_published_modules(
    home: Path, graphs: dict[str, bytes], model: VQGAN, photographs: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dat_workers.engines"):
        engine = create(EngineConfig("onnx", device="cpu"), model)
    assert "CPUExecutionProvider" in caplog.text
    images = torch.from_numpy(photographs[:2]).float() / 255
    agreement = compare(engine, create(EngineConfig("reference", device="cpu"), model), images)
    assert agreement.token_agreement > 0.998  # it adds in another order: near-ties
    assert agreement.psnr_db > 80
    assert agreement.non_finite == 0


def test_describe_names_the_provider(home: Path, graphs: dict[str, bytes]) -> None:
    discretizer = Discretizer.from_store("tiny-f8", EngineConfig("onnx", device="cpu"))
    assert discretizer.engine.describe() == {
        "engine": "onnx", "device": "cpu", "dtype": "fp32", "tricks": "none", "provider": "CPUExecutionProvider"
    }  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 13), dtype=np.uint8)
    both = discretizer.discretize(images, outputs=("reconstruction", "indices"))
    for i in range(2):
        one = discretizer.discretize(images[i : i + 1], outputs=("reconstruction", "indices"))
        assert all(np.array_equal(one[name][0], both[name][i]) for name in both)


def test_an_export_is_reused_until_it_is_damaged(
    home: Path, graphs: dict[str, bytes], model: VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[int] = []
    monkeypatch.setattr(engine, "export_graphs", lambda model: exports.append(1) or graphs)
    folder = engine.cached_export(model)
    assert engine.cached_export(model) == folder
    assert len(exports) == 1
    (folder / "decoder.onnx").write_bytes(b"half")
    assert engine.cached_export(model) == folder
    (folder / "codec.json").write_text("{}")
    assert engine.cached_export(model) == folder
    assert len(exports) == 3
    assert [p.name for p in (home / "onnx").iterdir()] == [folder.name]


def test_the_second_of_two_processes_takes_what_the_first_exported(
    home: Path, graphs: dict[str, bytes], model: VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(model: VQGAN) -> dict[str, bytes]:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "export_graphs", lambda model: graphs)
            engine.cached_export(model)  # the other process
        return graphs

    monkeypatch.setattr(engine, "export_graphs", overtaken)
    folder = engine.cached_export(model)
    assert engine.is_usable(folder, json.loads((folder / "codec.json").read_text())["fingerprint"])
    assert [p.name for p in (home / "onnx").iterdir()] == [folder.name]


def test_latents_that_are_not_finite_are_marked(home: Path, graphs: dict[str, bytes], model: VQGAN) -> None:
    engine = create(EngineConfig("onnx", device="cpu"), model)
    images = torch.rand(2, 3, 8, 8)
    images[1] = torch.inf
    tokens = engine.encode(images)
    assert tokens[1].item() == -1
    assert tokens[0].item() >= 0


def test_pictures_too_large_for_its_attention_are_refused(
    home: Path, graphs: dict[str, bytes], model: VQGAN
) -> None:
    engine = create(EngineConfig("onnx", device="cpu"), model)
    with pytest.raises(EngineError, match="at most 1048576"):
        engine.encode(torch.zeros(1, 3, 1024, 1032))
    with pytest.raises(EngineError, match="--engine torch"):
        engine.decode(torch.zeros(1, 128, 129, dtype=torch.int64))


@pytest.mark.parametrize(
    ("device", "dtype", "says"), [("cuda", "auto", "onnx-gpu"), ("warp", "auto", "warp"), ("cpu", "fp16", "fp32")]
)
def test_what_the_engine_cannot_do_is_said(
    device: str, dtype: str, says: str, model: VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=says):
        create(EngineConfig("onnx", device=device, dtype=dtype), model)


def test_a_missing_package_is_named_with_its_command(model: VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dat-service\[onnx\]'"):
        create(EngineConfig("onnx", device="cpu"), model)
