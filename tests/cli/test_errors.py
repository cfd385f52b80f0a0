"""Expected errors end every command with one line and a status; programming errors keep their traceback."""

from __future__ import annotations

import pytest
import typer

from dat_client import Unavailable
from dat_service.cli.errors import command_errors
from dat_service.ray.service import ServeFailed
from dat_service.settings import SettingsError
from dat_workers.codecs.spec import CodecError
from dat_workers.errors import InvalidInput, OutOfMemory


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and stderr of a command that raises `error`."""

    @command_errors("dat test", interrupted="interrupted; nothing was written")
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    return caught.value.exit_code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        CodecError("the codec is broken"),
        InvalidInput("images", "float64", "uint8", "the codec is broken"),
        OutOfMemory("the codec\nis broken"),
        SettingsError("the codec is broken"),
        ServeFailed("the codec is broken"),
        Unavailable("the codec is broken"),
        OSError("the codec is broken"),
        FloatingPointError("the codec is broken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_expected_errors_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(error, capsys) == (1, "dat test: the codec is broken\n")


def test_notes_follow_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("wrong")
    error.add_note("do this instead")
    assert ending(error, capsys) == (1, "dat test: wrong\ndo this instead\n")


def test_an_error_without_a_message_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(TimeoutError(), capsys) == (1, "dat test: TimeoutError\n")


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(KeyboardInterrupt(), capsys) == (130, "dat test: interrupted; nothing was written\n")


def test_a_status_that_was_chosen_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(typer.Exit(3), capsys) == (3, "")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), NotImplementedError("x"), RecursionError("x")])
def test_programming_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), command_errors("dat test"):
        raise error
