"""An attack that changes no token gives one warning, at the twentieth batch in a row."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from dat_client import Client


@pytest.fixture
def gradients(images: np.ndarray) -> np.ndarray:
    return np.ones(images.shape, np.float32)


def warnings_of(
    client: Client, batches: int, images: np.ndarray, gradients: Any = None, **options: Any
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(batches):
            client.discretize(images, gradients, **({"outputs": ["adversarial"]} | options))
    assert {(warning.category, warning.filename) for warning in caught} <= {(RuntimeWarning, __file__)}
    return [str(warning.message) for warning in caught]


def share(server: Any, value: float | None) -> None:
    parameters = {} if value is None else {"tokens_changed": value}
    server.change = lambda answer: {**answer, "parameters": parameters}


def test_twenty_batches_without_a_changed_token_give_one_warning(client, server, images, gradients):
    share(server, 0.0)
    assert warnings_of(client, 19, images, gradients) == []
    assert warnings_of(client, 41, images, gradients) == [
        "the attack changed no token in 20 batches in a row (preset='easyrobust', normalize='l2', alpha=0.1): "
        "pass a larger alpha, and check that the gradient of the loss is not 0"
    ]


def test_the_raw_gradient_is_named_as_the_reason(client, server, images, gradients):
    share(server, 0)
    (message,) = warnings_of(client, 20, images, gradients, preset="paper", alpha=0.3)
    assert "(preset='paper', normalize='none', alpha=0.3): pass preset='easyrobust', whose δ has the L2" in message


def test_the_twenty_must_follow_each_other(client, server, images, gradients):
    for _ in range(3):
        share(server, 0.0)
        assert warnings_of(client, 19, images, gradients) == []
        share(server, 0.001)
        assert warnings_of(client, 1, images, gradients) == []


@pytest.mark.parametrize(
    ("value", "options"),
    [(0.0, {"alpha": 0}), (0.0, {"alpha": 0.0}), (None, {}), (0.0, {"gradients": None, "replace_fraction": 0.001})],
)
def test_where_no_token_can_change_there_is_no_warning(client, server, images, gradients, value, options):
    share(server, value)
    assert warnings_of(client, 25, images, **({"gradients": gradients} | options)) == []
