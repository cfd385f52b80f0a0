"""Turns an expected error of any command into one line on stderr and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from dat_workers.system.ray_cluster import is_joining

FAILED = 1
INTERRUPTED = 130  # the status a shell reports for a process ended by SIGINT: 128 + 2


@contextmanager
def command_errors(command: str, *, interrupted: str = "interrupted") -> Iterator[None]:
    """Ends a command with one line on stderr if it fails for a reason outside of the code.

    >>> @command_errors("dat export")
    ... def export() -> None:
    ...     raise OSError("No space left on device")  # stderr: "dat export: No space left on device", status 1

    Each note of the error (`add_note`) follows on its own line. Ctrl-C prints the text `interrupted` and ends the
    command with status 130. All errors that come from mistakes in the code still show a traceback.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):  # both are RuntimeErrors
        raise
    except KeyboardInterrupt:
        typer.echo(f"{command}: {interrupted}", err=True)
        _end(INTERRUPTED)
    except Exception as error:
        if not _is_expected(error):
            raise
        # The text of a RayTaskError is the whole traceback of another process; its `cause` was raised there.
        cause = getattr(error, "cause", None)
        plain = cause if isinstance(cause, Exception) else error
        message = " ".join(str(plain).split()) or type(plain).__name__
        typer.echo("\n".join([f"{command}: {message}", *getattr(error, "__notes__", ())]), err=True)
        _end(FAILED)


def _end(status: int) -> NoReturn:
    """Ends the command with an exit status."""
    if is_joining():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status) from None


def _is_expected(error: Exception) -> bool:
    """Returns True if an error is caused by the input, the settings or the machine.

    ValueError covers CodecError, InvalidInput and SettingsError; RuntimeError covers EngineError, ServeFailed,
    missing optional packages and all that PyTorch reports about a device. FloatingPointError means that a training
    has diverged.
    """
    from dat_client import DatError

    if isinstance(error, NotImplementedError | RecursionError):
        return False
    return isinstance(error, DatError | ValueError | OSError | RuntimeError | FloatingPointError)
