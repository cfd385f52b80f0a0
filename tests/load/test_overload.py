from __future__ import annotations

import pytest

from tests.load.overload import SECONDS, TIMES, overload
from tests.load.traffic import show


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_ten_times_the_load_is_refused_politely() -> None:
    figures = overload()
    show("overload", figures)
    assert figures["errors"] == []
    assert figures["other statuses"] == {}
    assert figures["sent, requests/s"] > 0.7 * TIMES * figures["capacity, requests/s"]  # it was that much load
    assert figures["refused (503)"] > figures["answered"]
    assert figures["answered"] > 0.5 * SECONDS * figures["capacity, requests/s"]  # and it went on working
    assert figures["p99 over unloaded p99"] < 3
    assert figures["memory"] < 1.05
