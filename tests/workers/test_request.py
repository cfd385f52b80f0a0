"""The parameters of a request: which exist, and what they may be."""

from __future__ import annotations

from typing import Any

import pytest

from dat_workers.errors import InvalidInput
from dat_workers.perturbation import PRESETS, Step
from dat_workers.request import Parameters, parse_parameters


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"preset": "madry"}, "preset"),
        ({"base": "y"}, "base"),
        ({"normalize": "l1"}, "normalize"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": "0.1"}, "alpha"),
        ({"alpha": 1e39}, "alpha"),
        ({"alpha": 10**400}, "alpha"),
        ({"alpha": True}, "alpha"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"preset": ["paper"]}, "preset"),
        ({"replace_fraction": -0.1}, "replace_fraction"),
        ({"replace_fraction": None}, "replace_fraction"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"output_dtype": "FP64"}, "output_dtype"),
        ({"strength": 1}, "parameters"),
    ],
)
def test_parameters_that_are_not_usable(parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_parameters(parameters)
    assert caught.value.field == field


def test_parameters_change_a_preset() -> None:
    parameters = {"preset": "easyrobust", "base": "x", "normalize": "sign", "alpha": 1, "epsilon": 0.03}
    assert parse_parameters(parameters).step == Step("x", "sign", 1.0, 0.03)
    assert parse_parameters({}) == Parameters(PRESETS["easyrobust"], 0.0, 0, None)


def test_parameters_beside_the_step() -> None:
    parsed = parse_parameters({"replace_fraction": 1, "seed": 7, "output_dtype": "FP16", "epsilon": None})
    assert parsed == Parameters(PRESETS["easyrobust"], 1.0, 7, "FP16")
