"""The files of deploy/, parsed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"


def documents(name: str) -> list[Any]:
    """The documents of a YAML (or JSON) file under deploy/."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def document(name: str) -> Any:
    """The only one."""
    (only,) = documents(name)
    return only


def problems(value: Any, schema: str, part: str | None = None) -> list[str]:
    """Where a value does not keep to tests/deploy/schemas/SCHEMA.json, or to one of its $defs."""
    whole = json.loads((SCHEMAS / f"{schema}.json").read_text())
    Draft202012Validator.check_schema(whole)
    if part is not None:
        whole = {"$ref": f"#/$defs/{part}", "$defs": whole["$defs"]}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(whole).iter_errors(value)]


@cache
def serve_flags() -> set[str]:
    """The options of `dat serve`."""
    import typer.main

    from dat_service.cli.main import app

    group: Any = typer.main.get_command(app)
    return {flag for option in group.commands["serve"].params for flag in option.opts}


def unknown_flags(given: list[str]) -> list[str]:
    """Those of the flags in `--flag=value`, `--flag` or `value` words that `dat serve` does not know."""
    return [word for word in given if word.startswith("--") and word.partition("=")[0] not in serve_flags()]
