"""`dat bench client` against the service that the other tests use."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner, Result

from dat_service.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "client", *arguments])


@pytest.mark.parametrize("more", [[], ["--gradients", "FP16", "--in-flight", "2", "--parts", "2"]])
def test_it_prints_the_split(local_url: str, more: list[str]) -> None:
    result = run("--url", local_url, "--batch", "2", "--size", "32", "--calls", "3", *more)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{local_url}, tiny-f8, 2 x 3 x 32 x 32 uint8")
    assert re.search(r"^3 calls in .* images/s, .* MB/s$", result.stdout, re.MULTILINE)
    found = dict(re.findall(r"^(\w+) +([\d.]+) ms", result.stdout, re.MULTILINE))
    assert list(found) == ["client", "repeats", "network", "queue", "codec", "server", "total"]
    assert float(found["codec"]) > 0


def test_an_unreachable_service_is_reported_in_one_line() -> None:
    result = run("--url", "http://127.0.0.1:9", "--timeout-s", "0.3")
    assert result.exit_code == 1
    assert result.stderr.startswith("dat bench client: ")
    assert "not ready after 0.3 s" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert run("--calls", "0").exit_code == 2
    assert run("--gradients", "FP64").exit_code == 2
