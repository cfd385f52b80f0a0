"""The names, datatypes and limits that client and service share. Each is defined only here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dat_client.wire.tensors import DATATYPES

#: The inputs of a request that sends images. A request that decodes tokens has the single input `indices`.
INPUTS = ("images", "gradients", "gradient_scales")

#: The outputs of a codec. A codec without tokens has only the first two.
OUTPUTS = ("reconstruction", "adversarial", "indices", "adversarial_indices")


def default_outputs(has_attack: bool) -> tuple[str, ...]:
    """Returns the outputs of a request that names no outputs.

    `has_attack` is True if the request sends gradients or a replace_fraction above 0.
    """
    return ("reconstruction", "adversarial") if has_attack else ("reconstruction",)


#: OIP datatype -> numpy dtype of images, sent or received. The keys are the values of the parameter `output_dtype`.
OUTPUT_DTYPES = {name: DATATYPES[name] for name in ("UINT8", "FP16", "FP32")}

#: OIP datatype -> numpy dtype of `gradients`. INT8 needs `gradient_scales`, FP16 may have them.
GRADIENT_DTYPES = {name: DATATYPES[name] for name in ("FP16", "FP32", "INT8")}

#: OIP datatype -> numpy dtype of `indices`.
INDEX_DTYPES = {name: DATATYPES[name] for name in ("UINT16", "INT32")}

#: The parameters of the step of Algorithm 1 by `preset`: those of the paper and those of the authors' code.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"base": "x", "normalize": "none", "alpha": 0.1, "epsilon": None},
    "easyrobust": {"base": "reconstruction", "normalize": "l2", "alpha": 0.1, "epsilon": None},
}

#: The defaults of parameters that a request omits. Parameters that are not listed here get theirs from the preset.
#: The preset is not `paper`, whose raw gradient is too short to change tokens of most models (docs/decisions.md).
DEFAULTS: dict[str, Any] = {"preset": "easyrobust", "replace_fraction": 0.0, "seed": 0, "output_dtype": None}


@dataclass(frozen=True)
class Parameter:
    """The limit of a request parameter: `allows(value)` tests it, and `limit` describes it in messages."""

    limit: str
    allows: Callable[[Any], bool]


def _choice(choices: Iterable[str]) -> Parameter:
    names = tuple(choices)
    return Parameter(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _number(low: float, high: float, limit: str, types: Any = int | float) -> Parameter:
    def allows(value: Any) -> bool:  # NaN fails both comparisons
        return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high

    return Parameter(limit, allows)


#: The parameters of a request, in the order in which messages name them.
#: Numbers are limited to 1e38: larger ones may be infinite in fp32, and infinity times a gradient of 0 is NaN.
PARAMETERS: dict[str, Parameter] = {
    "preset": _choice(PRESETS),
    "base": _choice(["x", "reconstruction"]),
    "alpha": _number(0, 1e38, "a finite number, 0 or more, at most 1e38"),
    "normalize": _choice(["none", "l2", "sign"]),
    "epsilon": _number(0, 1e38, "a finite number, 0 or more, at most 1e38"),
    "replace_fraction": _number(0, 1, "a number, 0 to 1"),
    "seed": _number(0, 2**63 - 1, "a whole number, 0 to 2^63 - 1", int),
    "output_dtype": _choice(OUTPUT_DTYPES),
}
#: The parameters of the step. They have no effect without gradients or a replace_fraction, and are then refused.
STEP_PARAMETERS = ("base", "alpha", "normalize", "epsilon")
#: The parameters that a request may send as null, which stands for the default.
NULLABLE = ("epsilon", "output_dtype")


def violated_limit(name: str, value: Any) -> str | None:
    """Returns the limit that a parameter's value violates; None if the value is allowed. KeyError: unknown name.

    >>> violated_limit("alpha", 0.2)
    >>> violated_limit("replace_fraction", 1.5)
    'a number, 0 to 1'
    """
    parameter = PARAMETERS[name]
    allowed = parameter.allows(value) or (value is None and name in NULLABLE)
    return None if allowed else parameter.limit


def step_without_attack(parameters: Mapping[str, Any], has_gradients: bool) -> list[str]:
    """Returns the parameters of the step that a request sets although nothing is attacked; usually an empty list.

    >>> step_without_attack({"preset": "paper", "alpha": 0.2, "epsilon": None}, has_gradients=False)
    ['alpha']
    """
    if has_gradients or parameters.get("replace_fraction"):
        return []
    return [name for name in STEP_PARAMETERS if parameters.get(name) is not None]


#: What to do about parameters that `step_without_attack` returns.
ATTACK_IS_MISSING = "gradients, or a replace_fraction above 0; a preset alone is allowed"


def with_defaults(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all parameters: from the request, else from its preset, else from DEFAULTS.

    `parameters` are those of the request. A preset that is not known here, which only a newer service takes, sets
    nothing.

    >>> with_defaults({"preset": "easyrobust", "alpha": 0.2})["normalize"]
    'l2'
    """
    return {**DEFAULTS, **PRESETS.get(parameters.get("preset", DEFAULTS["preset"]), {}), **parameters}
