"""Parses the JSON part of a message and returns typed values from it. Every function may raise WireError."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn, TypeVar

from dat_client.errors import WireError, sentence
from dat_client.wire.tensors import malformed

T = TypeVar("T")

_NAMES = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}


def parse(view: memoryview) -> dict[str, Any]:
    """Parses UTF-8 bytes as JSON and returns the object; raises WireError if they are not a JSON object."""
    try:
        text = str(view, "utf-8")
        parsed = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except WireError:
        raise
    except RecursionError:
        malformed("body: the JSON is nested too deeply")
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more than 4300 digits
        malformed(f"body: not JSON ({sentence(str(error))})", value=bytes(view[:80]))
    if not isinstance(parsed, dict):
        malformed("body: the JSON is not an object", value=parsed)
    return parsed


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, and refuses a key that occurs twice: programs disagree about which of both counts."""
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        malformed("body: a key of the JSON occurs twice in one object", value=repeated)
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    malformed("body: not JSON", value=name)  # NaN and Infinity are not JSON, but Python accepts them by default


def typed(value: Any, kind: type[T], field: str) -> T:
    """Returns `value`; raises WireError, naming `field`, if it is not of type `kind`."""
    if not isinstance(value, kind):
        malformed(f"must be {_NAMES[kind]}", field, value)
    return value


def optional(parent: dict[str, Any], key: str, kind: type[T]) -> T | None:
    """Returns the value under `key`, or None if the key is missing or null.

    Raises WireError if the value has a type other than `kind`.
    """
    value = parent.get(key)
    return None if value is None else typed(value, kind, key)


def get_parameters(parent: dict[str, Any]) -> dict[str, Any]:
    """Returns the object `parameters` of a message or of one of its tensors; {} if it is missing or null."""
    return optional(parent, "parameters", dict) or {}


def get_name(entry: Any, field: str) -> str:
    """Returns the `name` in the JSON entry of a tensor; raises WireError, naming `field`, if there is none."""
    name = optional(typed(entry, dict, field), "name", str)
    if name is None:
        malformed("the name is missing", field)
    return name
