"""What `--help` prints: every option is described by a sentence and names its default, brackets included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from dat_service import __version__
from dat_service.cli.main import app
from dat_service.settings import Settings


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


COMMANDS = {" ".join(names): command for names, command in commands(typer.main.get_command(app))}


def words(text: str) -> str:
    return " ".join(text.split())


def help_of(*arguments: str) -> str:
    finished = CliRunner().invoke(app, [*arguments, "--help"])
    assert finished.exit_code == 0, finished.output
    return words(finished.output)


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("bench ")])
def test_every_option_is_described(name: str) -> None:
    printed = help_of(*name.split())
    assert re.match(r"[A-Z].*\.$", words(COMMANDS[name].help), re.DOTALL)
    for parameter in COMMANDS[name].params:
        if parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        assert re.search(r"^\S.*[.\]]$", parameter.help), parameter.name
        assert words(parameter.help) in printed  # rich's markup would drop what is in brackets


@pytest.mark.parametrize("name", COMMANDS)
def test_all_commands_have_one_style(name: str) -> None:
    """Defaults stand after two spaces, as click writes them; arguments are in capitals."""
    for parameter in COMMANDS[name].params:
        assert not re.search(r"\S \[default", parameter.help or ""), parameter.name
        if parameter.param_type_name == "argument":
            assert parameter.metavar.isupper(), parameter.name


def test_serve_says_all_defaults() -> None:
    """Except those of switches, which are off, and of --serve-config, which is another thing to do."""
    for parameter in COMMANDS["serve"].params:
        if not parameter.is_flag and parameter.name not in ("serve_config", "help"):
            assert "  [default: " in parameter.help, parameter.name


def test_serve_says_the_defaults_of_the_settings() -> None:
    printed = help_of("serve")
    for name in ("port", "host", "engine", "device", "dtype", "tricks", "threads", "replicas", "max_queue_s"):
        field = Settings.model_fields[name]
        assert f"{field.description} [default: {field.default}]" in printed
    assert "[default: 2 on CUDA, else 0]" in printed


@pytest.mark.parametrize("name", ["discretize", "precompute"])
def test_shared_options_read_alike(name: str) -> None:
    serve = help_of("serve")
    for option in ("engine", "device", "dtype", "tricks"):
        description = Settings.model_fields[option].description
        assert description is not None
        assert description in serve
        assert f"{description} [default: auto]" in help_of(name)


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"dat {__version__}\n"
    assert "Show the version and exit." in help_of()
