"""`dat bench client` against the service that the other tests use."""

from __future__ import annotations

import re

import pytest

from dat_service.bench.client import main


@pytest.mark.parametrize("more", [[], ["--gradients", "FP16", "--in-flight", "2", "--parts", "2"]])
def test_it_prints_the_split(local_url: str, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    arguments = ["--url", local_url, "--batch", "2", "--size", "32", "--calls", "3", *more]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{local_url}, tiny-f8, 2 x 3 x 32 x 32 uint8")
    assert re.search(r"^3 calls in .* images/s, .* MB/s$", printed, re.MULTILINE)
    found = dict(re.findall(r"^(\w+) +([\d.]+) ms", printed, re.MULTILINE))
    assert list(found) == ["client", "repeats", "network", "queue", "codec", "server", "total"]
    assert float(found["codec"]) > 0


def test_who_is_not_there_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--url", "http://127.0.0.1:9", "--timeout-s", "0.3"])
    assert caught.value.code == 1
    assert "not ready after 0.3 s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--calls", "0"])
