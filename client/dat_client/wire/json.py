"""The JSON part of a message: parses it and takes typed values out of it, or raises WireError."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from dat_client.errors import WireError, shown
from dat_client.wire.tensors import malformed

T = TypeVar("T")

_NAMES = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}


def parse(view: memoryview) -> dict[str, Any]:
    """Returns the JSON object in these bytes."""
    try:
        parsed = json.loads(str(view, "utf-8"), parse_constant=_refuse_constant)
    except WireError:
        raise
    except RecursionError:
        malformed("body: the JSON is nested too deep")
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more than 4300 digits
        malformed(f"body: not JSON ({shown(str(error))})", value=bytes(view[:80]))
    if not isinstance(parsed, dict):
        malformed("body: the JSON is not an object", value=parsed)
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    malformed("body: not JSON", value=name)  # NaN and Infinity, which Python reads by default


def typed(value: Any, kind: type[T], field: str) -> T:
    """Returns a JSON value if it is of a type."""
    if not isinstance(value, kind):
        malformed(f"not {_NAMES[kind]}", field, value)
    return value


def optional(parent: dict[str, Any], key: str, kind: type[T]) -> T | None:
    """Returns the value under a key if it is of a type, None if the key is missing or null."""
    value = parent.get(key)
    return None if value is None else typed(value, kind, key)


def get_parameters(parent: dict[str, Any]) -> dict[str, Any]:
    """Returns the object `parameters` of a message or of one of its tensors, an empty one if there is none."""
    return optional(parent, "parameters", dict) or {}


def get_name(entry: Any, field: str) -> str:
    """Returns the name of a tensor's entry."""
    name = optional(typed(entry, dict, field), "name", str)
    if name is None:
        malformed("name missing", field)
    return name
