"""Expected errors end every command with one line and a status; programming errors keep their traceback."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import typer
from ray.exceptions import RayTaskError
from typer.testing import CliRunner

from dat_client import Unavailable
from dat_service.cli.errors import command_errors
from dat_service.cli.main import app
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


def test_an_error_within_ray_is_one_line_without_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    remote = RayTaskError("ready", "Traceback (most recent call last):\n  File ...", RuntimeError("port in use"))
    assert ending(remote.as_instanceof_cause(), capsys) == (1, "dat test: port in use\n")


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(KeyboardInterrupt(), capsys) == (130, "dat test: interrupted; nothing was written\n")


def test_a_status_that_was_chosen_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(typer.Exit(3), capsys) == (3, "")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), NotImplementedError("x"), RecursionError("x")])
def test_programming_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), command_errors("dat test"):
        raise error


class EndlessService:
    """Stands in for Ray Serve on a shared cluster: it starts, and refuses to stop."""

    def __init__(self, *_: Any) -> None:
        self.urls = {"identity": "http://127.0.0.1:9"}

    def start(self) -> None:
        pass

    def stop(self) -> None:
        raise ServeFailed("on the cluster there may still be identity")


def test_a_service_that_does_not_stop_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dat_service.ray.service.RayService", EndlessService)
    monkeypatch.setattr("dat_service.cli.serve._check_startable", lambda *_, **__: None)
    monkeypatch.setattr("dat_service.cli.serve._print_ready", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    finished = CliRunner().invoke(app, ["serve", "--codec", "identity"])
    assert finished.exit_code == 1
    assert finished.stderr == "dat serve: on the cluster there may still be identity\n"


def test_ctrl_c_while_a_codec_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dat_workers.codecs.store.CodecStore.load", interrupt)
    finished = CliRunner().invoke(app, ["export", "folder"])
    assert (finished.exit_code, finished.stderr) == (130, "dat export: interrupted\n")
