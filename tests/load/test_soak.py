from __future__ import annotations

import pytest

from tests.load.soak import SECONDS, show_soak, soak


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_nothing_grows() -> None:
    figures = soak()
    show_soak(figures)
    assert figures["errors"] == []
    assert figures["calls"] > SECONDS
    assert {"replica", "haproxy", "service", "client", "raylet"} <= {row["role"] for row in figures["table"]}
    assert figures["grown"] == []
