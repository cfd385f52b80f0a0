from __future__ import annotations

import pytest

from tests.load.chaos import EVERY_S, SECONDS, chaos
from tests.load.traffic import show


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_no_error_reaches_a_caller_while_replicas_and_proxies_are_killed() -> None:
    figures = chaos()
    show("chaos", figures)
    assert figures["errors"] == []
    assert figures["calls"] > 2 * SECONDS
    assert figures["replica"] >= SECONDS / EVERY_S - 3
    assert (figures["haproxy"], figures["proxy"]) == (1, 1)
