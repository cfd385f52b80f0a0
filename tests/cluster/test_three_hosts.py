from __future__ import annotations

import pytest

from tests.cluster.hosts import why_not
from tests.cluster.three_hosts import SECONDS, three_hosts
from tests.load.traffic import show


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 1200)
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_no_error_reaches_who_talks_to_a_living_host() -> None:
    figures = three_hosts()
    show("three hosts", figures)
    assert figures["errors"] == []
    assert figures["answered while c was cut off"] > SECONDS / 4
    assert figures["answered after b was killed"] > SECONDS / 4
    assert figures["processes killed on b"] > 2
