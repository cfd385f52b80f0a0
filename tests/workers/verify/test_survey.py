"""The table of engines, and the one that it recommends."""

from __future__ import annotations

import weakref

import pytest
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.store import load_model
from dat_workers.engines.base import Engine
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.engines.identity import IdentityEngine
from dat_workers.verify import survey as survey_module
from dat_workers.verify.agreement import Agreement, reference_outputs
from dat_workers.verify.survey import Row, deciding_rows, fastest_passing, survey

GOOD = Agreement(1.0, 100.0, 1e-6, 0, False, 1.0, 1.0)


def test_the_table_names_the_layer_and_the_default(images: Tensor) -> None:
    model = load_model("tiny-f8")
    model.decoder.up[1].block[0].conv1.weight.mul_(1e6)
    expected = reference_outputs(create(EngineConfig("reference", device="cpu"), model), images[:1])
    rows = survey(model, expected, device="cpu", engines=["torch", "auto"], dtypes=["auto", "fp16"], rounds=1)
    found = [(row.name, row.default) for row in rows]
    assert found == [("torch fp32", False), ("torch fp16", False), ("cpu fp32", True), ("cpu fp16", False)]
    assert rows[3].error is not None
    assert rows[0].overflow is None
    assert rows[1].overflow is not None
    assert "decoder.up.1.block.0.conv1" in rows[1].overflow
    assert rows[1].agreement is not None
    assert rows[1].agreement.non_finite == 1
    assert rows[0].images_per_s


def test_there_is_one_engine_at_a_time(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs each engine holds 10 GB or more."""
    alive: weakref.WeakSet[Engine] = weakref.WeakSet()
    most = 0

    def create_and_count(config: EngineConfig, model: VQGAN) -> Engine:
        nonlocal most
        engine = create(config, model)
        alive.add(engine)
        most = max(most, len(alive))
        return engine

    model = load_model("tiny-f8")
    expected = reference_outputs(create(EngineConfig("reference", device="cpu"), model), images[:1])
    monkeypatch.setattr(survey_module, "create", create_and_count)
    rows = survey(model, expected, device="cpu", engines=["torch"], dtypes=["fp32", "mixed", "bf16"], rounds=1)
    assert [row.images_per_s is not None for row in rows] == [True] * 3
    assert most == 1


def test_the_fastest_that_passes_is_chosen() -> None:
    rows = [
        Row("torch", "fp32", True, GOOD, 10.0),
        Row("torch", "fp16", False, Agreement(0.999, 60.0, 1e-3, 0, True, 0.5, 0.1), 90.0),
        Row("torch", "bf16", False, Agreement(0.996, 60.0, 1e-3, 0, True, 0.96, 0.1), 50.0),
        Row("onnx", "fp32", False, error="not installed"),
    ]
    best = fastest_passing(rows)
    assert best is not None
    assert best.name == "torch bf16"
    assert fastest_passing(rows[1:2] + rows[3:]) is None
    assert deciding_rows(rows, engines=False, dtypes=False) == rows[:1]
    assert deciding_rows(rows, engines=True, dtypes=True) == rows
    missing = [Row("onnx", "fp32", False, error="RuntimeError: needs: pip install 'dat-service[onnx]'")]
    assert deciding_rows(rows + missing, engines=False, dtypes=True) == rows
    assert deciding_rows(rows + missing, engines=True, dtypes=True) == rows + missing
    assert rows[3].shortfall == "not installed"


def test_an_engine_that_fails_while_it_is_timed_has_no_speed(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = IdentityEngine()
    assert survey_module._images_per_s(engine, images[:1], rounds=2)
    calls = iter(range(2))

    def fails_at_the_third_call(images: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise MemoryError
        return images

    monkeypatch.setattr(engine, "encode", fails_at_the_third_call)
    assert survey_module._images_per_s(engine, images[:1], rounds=2) is None
