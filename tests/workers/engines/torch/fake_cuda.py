"""Stands in for the parts of torch.cuda that capture graphs and copy arrays, so that both run on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeCuda:
    """Records which stream, pool and device each step used; the functions themselves run on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures: list[tuple[Any, Any]] = []  # (stream, pool) of each captured graph
        self.current_device = 0
        self.current_stream: Any = self.make_stream(torch.device("cuda:0"))
        for name, value in {
            "Stream": self.make_stream,
            "current_stream": lambda device=None: self.current_stream,
            "stream": self.stream,
            "device": self.device,
            "CUDAGraph": SimpleNamespace,
            "graph": self.graph,
            "graph_pool_handle": object,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def make_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current_stream = self.current_stream, stream
        try:
            yield
        finally:
            self.current_stream = before

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current_device = self.current_device, device.index or 0
        try:
            yield
        finally:
            self.current_device = before

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.captures.append((stream, pool))
        graph.replay = lambda: None
        with self.stream(stream):
            yield


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)
