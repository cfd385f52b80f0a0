"""Gives the tests of `dat codecs` and `dat train-codec` the fixtures of the codecs and of the training."""

from __future__ import annotations

from tests.workers.codecs.conftest import (  # noqa: F401
    _no_proxy,
    _weights,
    lightning_checkpoint,
    source,
    spec,
    weights,
)
from tests.workers.training.conftest import pictures  # noqa: F401
