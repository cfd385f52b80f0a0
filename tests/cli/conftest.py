"""Gives the tests of `dat codecs` the toy codec and the loopback server of tests/workers/codecs."""

from __future__ import annotations

from tests.workers.codecs.conftest import (  # noqa: F401
    _no_proxy,
    _weights,
    lightning_checkpoint,
    source,
    spec,
    weights,
)
