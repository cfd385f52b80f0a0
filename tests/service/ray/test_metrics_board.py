"""Replicas share their metrics; tested without Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from dat_service.ray.metrics_board import SharedMetrics
from tests.service.observability.test_metrics import busy, parsed


def test_board_forgets_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from dat_service.ray import metrics_board

    now = 100.0
    monkeypatch.setattr(metrics_board, "time", SimpleNamespace(monotonic=lambda: now))
    board = metrics_board.MetricsBoard()
    board.put("r1", busy("r1", 1).families())
    now += 20
    board.put("r2", busy("r2", 1).families())
    assert len(board.others("r3")) == 2
    assert len(board.others("r1")) == 1
    now += 11
    assert [f[0].samples[0].labels["replica"] for f in board.others("r3")] == ["r2"]
    board.put("r2", [])
    assert board.newest.keys() == {"r2"}


def test_scrape_goes_on_without_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board that never answers delays a scrape by a limited time, and the replica's own metrics are shown."""
    from concurrent.futures import Future

    from dat_service.ray import metrics_board as module

    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(SharedMetrics, "_push", lambda self: None)
    futures: list[Future[object]] = []

    class Method:
        def remote(self, *_: object) -> SimpleNamespace:
            futures.append(Future())
            return SimpleNamespace(future=lambda: futures[-1])

    shared = SharedMetrics(busy("r1", 3), "app")
    shared._board = SimpleNamespace(put=Method(), others=Method())
    _, samples = parsed(asyncio.run(shared.families()))
    assert samples["dat_images_total/plain", "r1"] == 3
    assert len(futures) == 2
