"""ONNX Runtime's providers."""

from __future__ import annotations

from typing import Any

import pytest

from dat_workers.engines.onnx import sessions

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_providers_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["CPUExecutionProvider", "AzureExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    assert [name[:4] for name in sessions.pick_providers("auto")] == ["Tens", "CUDA", "CPUE"]
    assert sessions.pick_providers("cpu") == ["CPUExecutionProvider"]
