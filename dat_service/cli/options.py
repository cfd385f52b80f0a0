"""Declares each option that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dat_service.settings import Settings
from dat_workers.errors import InvalidInput


def setting(name: str, **options: Any) -> Any:
    """Returns an option whose help text is the description of a field of `Settings`, followed by its default."""
    field = Settings.model_fields[name]
    default = "" if field.default is None else f"  [default: {field.default}]"
    return typer.Option(help=f"{field.description}{default}", show_default=False, **options)


Codec = Annotated[str, typer.Option(help="Name of the codec; `dat codecs list` shows all names.")]
Engine = Annotated[str, setting("engine")]
Device = Annotated[str, setting("device")]
Dtype = Annotated[str, setting("dtype")]
OnError = Annotated[
    str,
    typer.Option(help="At a picture that is not usable: fail (end with an error) or skip (leave it out, list it)."),
]
Upright = Annotated[
    bool,
    typer.Option(
        "--upright/--as-stored",
        help="Turn pictures by their EXIF orientation, or take the pixels as they are stored, as torchvision does; "
        "the stored Q(x) then has the same orientation tag.",
    ),
]
Tricks = Annotated[str, setting("tricks")]


def skips(on_error: str) -> bool:
    """Returns True if --on-error is skip, False if it is fail. Raises InvalidInput for other values."""
    if on_error not in ("fail", "skip"):
        raise InvalidInput("--on-error", repr(on_error), "fail or skip")
    return on_error == "skip"
