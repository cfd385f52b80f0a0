"""Declares each option that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dat_service.settings import Settings


def setting(name: str, **options: Any) -> Any:
    """Returns an option whose help text is the description of a field of `Settings`, followed by its default."""
    field = Settings.model_fields[name]
    default = "" if field.default is None else f" [default: {field.default}]"
    return typer.Option(help=f"{field.description}{default}", show_default=False, **options)


Codec = Annotated[str, typer.Option(help="Name of the codec; `dat codecs list` shows all names.")]
Engine = Annotated[str, setting("engine")]
Device = Annotated[str, setting("device")]
Dtype = Annotated[str, setting("dtype")]
Tricks = Annotated[str, setting("tricks")]
