"""How workers are placed on Ray, with a stand-in for Ray; tests/e2e runs them on a real one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dat_workers.engines.config import EngineConfig
from dat_workers.precompute.ray_workers import RayWorkers


class FakeRay:
    """A Ray with 4 GPUs, whose actors start at once; it records their options and arguments."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.configs: list[EngineConfig] = []
        self.exceptions = SimpleNamespace(ActorDiedError=KeyError, RayError=OSError)

    def init(self, **_: object) -> None: ...

    def shutdown(self) -> None: ...

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": 4.0}

    def remote(self, actor: object) -> Any:
        def options(**given: Any) -> Any:
            self.options = given
            return SimpleNamespace(remote=start)

        def start(codec: str, config: EngineConfig) -> Any:
            self.configs.append(config)
            return SimpleNamespace(counts=SimpleNamespace(remote=object))

        return SimpleNamespace(options=options)

    def wait(self, calls: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return calls, []

    def get(self, call: object) -> None: ...


@pytest.mark.parametrize(
    ("gpus", "device", "reserved", "used"),
    [
        (None, "auto", 1, "auto"),
        (0.5, "auto", 0.5, "auto"),
        (0, "auto", 0, "cpu"),
        (None, "cpu", 0, "cpu"),
    ],
)
def test_workers_without_gpus_take_none(
    gpus: float | None, device: str, reserved: float, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since Ray 2.60 such an actor sees all GPUs of its node, and `auto` would use the first of them."""
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    RayWorkers("tiny-f8", EngineConfig(device=device), 2, gpus)
    assert ray.options["num_gpus"] == reserved
    assert [config.device for config in ray.configs] == [used, used]
    assert [config.gpu_share for config in ray.configs] == [0.5 if gpus == 0.5 else 1] * 2


def test_a_gpu_without_reserving_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="device is 'cuda', but each worker reserves 0 GPUs"):
        RayWorkers("tiny-f8", EngineConfig(device="cuda"), 1, 0)
