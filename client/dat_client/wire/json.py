"""The JSON part of a message: parsing it and taking typed values out of it, or WireError."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from dat_client.errors import WireError, shown
from dat_client.wire.tensors import malformed


def parse(view: memoryview) -> dict[str, Any]:
    """The JSON object in these bytes."""
    try:
        parsed = json.loads(str(view, "utf-8"), parse_constant=_no_constant)
    except WireError:
        raise
    except RecursionError:
        malformed("body: JSON nested too deep")
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more than 4300 digits
        malformed(f"body: not JSON ({shown(str(error))})", None, bytes(view[:80]))
    if not isinstance(parsed, dict):
        malformed("body: the JSON is not an object", None, parsed)
    return parsed


def _no_constant(name: str) -> NoReturn:
    malformed("body: not JSON", None, name)


def as_list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        malformed("not a list", field, value)
    return value


def get_object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        malformed("not an object", key, value)
    return value


def get_name(entry: Any, field: str) -> str:
    if not isinstance(entry, dict):
        malformed("not an object", field, entry)
    name = get_text(entry, "name")
    if name is None:
        malformed("name missing", field)
    return name


def get_text(parent: dict[str, Any], key: str) -> str | None:
    value = parent.get(key)
    if value is not None and not isinstance(value, str):
        malformed("not a string", key, value)
    return value


def as_flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        malformed("neither true nor false", field, value)
    return value
