from __future__ import annotations

import math

import pytest

from dat_client.wire import vocabulary

GOOD = {
    "preset": ["paper", "easyrobust"],
    "base": ["x", "reconstruction"],
    "alpha": [0, 0.2, 1e38],
    "normalize": ["none", "l2", "sign"],
    "epsilon": [None, 0, 0.5, 1e38],
    "replace_fraction": [0, 0.5, 1],
    "seed": [0, 2**63 - 1],
    "output_dtype": [None, "UINT8", "FP16", "FP32"],
}
BAD = {
    "preset": [None, "Paper", 1, ["paper"]],
    "base": [None, "y", {}],
    "alpha": [None, "0.1", True, -0.1, -1e38, math.nan, math.inf, 1.1e38, 10**400],
    "normalize": [None, "l1"],
    "epsilon": [-1e-9, "0", False, math.nan, math.inf],
    "replace_fraction": [None, -0.1, 1.1, True],
    "seed": [None, -1, 2**63, 1.0, True],
    "output_dtype": ["INT8", "fp16", 8],
}


@pytest.mark.parametrize("name", vocabulary.PARAMETERS)
def test_limits_of_parameters(name):
    assert [vocabulary.violated_limit(name, value) for value in GOOD[name]] == [None] * len(GOOD[name])
    assert all(vocabulary.violated_limit(name, value) for value in BAD[name])


def test_defaults_of_parameters_keep_their_limits():
    for preset in vocabulary.PRESETS:
        values = vocabulary.with_defaults({"preset": preset})
        assert set(values) == set(vocabulary.PARAMETERS)
        assert [name for name, value in values.items() if vocabulary.violated_limit(name, value)] == []


def test_what_a_request_says_wins_over_its_preset():
    values = vocabulary.with_defaults({"preset": "easyrobust", "normalize": "sign", "seed": 3})
    assert (values["base"], values["normalize"], values["alpha"], values["seed"]) == (
        "reconstruction",
        "sign",
        0.1,
        3,
    )
    assert vocabulary.with_defaults({})["normalize"] == "l2"
    assert vocabulary.with_defaults({"preset": "paper"})["normalize"] == "none"
