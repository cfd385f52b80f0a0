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
        ({"alpha": -0.1}, "alpha"),
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


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), (-0.1, "-0.1"), ("x", "'x'")])
def test_values_are_shown_as_json(value: Any, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_parameters({"alpha": value})
    assert caught.value.value == (value if not isinstance(value, str) else "'x'")
    assert str(caught.value) == (f"alpha: {text} is not usable; expected a finite number, 0 or more, at most 1e38")


def test_unknown_parameter_is_named_with_all_that_exist() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_parameters({"strength": 1})
    assert str(caught.value) == (
        "parameters: 'strength' does not exist; use only preset, base, alpha, normalize, epsilon, "
        "replace_fraction, seed, output_dtype"
    )


def test_parameters_change_a_preset() -> None:
    parameters = {"preset": "easyrobust", "base": "x", "normalize": "sign", "alpha": 1, "epsilon": 0.03}
    assert parse_parameters(parameters).step == Step("x", "sign", 1.0, 0.03)
    assert parse_parameters({}) == Parameters(PRESETS["easyrobust"], 0.0, 0, None)


def test_parameters_beside_the_step() -> None:
    parsed = parse_parameters({"replace_fraction": 1, "seed": 7, "output_dtype": "FP16", "epsilon": None})
    assert parsed == Parameters(PRESETS["easyrobust"], 1.0, 7, "FP16")
