"""The settings of an engine: what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from dat_workers.engines.config import DEFAULT_ENGINE, EngineConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "tensorflow"}, "engine is 'tensorflow', but must be one of .*'torch'"),
        ({"dtype": "fp8"}, "dtype is 'fp8', but must be one of .*'mixed'"),
        ({"tricks": "all,-magic"}, "'-magic' does not exist"),
        ({"engine": "cpu", "tricks": "sdpa"}, "tricks is 'sdpa', but the engine 'cpu' has no tricks"),
        ({"threads": -1}, "threads is -1, but must be 0"),
    ],
)
def test_settings_that_are_not_usable(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_threads() -> None:
    assert EngineConfig(threads=3).cpu_threads == 3
    assert DEFAULT_ENGINE.cpu_threads >= 1
