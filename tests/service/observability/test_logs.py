"""Each record is one log line, whatever a client wrote into it."""

from __future__ import annotations

import json
import logging

import pytest

from dat_service.observability import logs

NASTY = "a\nFAKE line\r\x1b[31m\u2028b"
log = logging.getLogger("dat_service")


def write(fields: dict[str, object] | None = None) -> None:
    token = logs.REQUEST_ID.set("id-7")
    try:
        log.warning("said %s", NASTY, extra={"fields": fields or {}})
    finally:
        logs.REQUEST_ID.reset(token)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    write({"path": NASTY, "peer": "::1", "empty": ""})
    log.debug("not this")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.removesuffix("\n").split("\n")
    assert line.isprintable()
    moment, rest = line.split(" ", 1)
    assert moment.endswith("Z")
    assert moment[:2] == "20"
    shown = r"a\nFAKE line\r\x1b[31m\u2028b"
    assert rest == f'WARNING dat_service [id-7] said {shown} path={json.dumps(shown)} peer=::1 empty=""'


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "debug")
    write({"path": NASTY, "status": 404})
    (line,) = capsys.readouterr().err.removesuffix("\n").split("\n")
    record = json.loads(line)
    assert line.isascii()
    assert set(record) == {"time", "level", "logger", "request_id", "message", "fields"}
    assert record["fields"] == {"path": NASTY, "status": 404}
    assert (record["level"], record["request_id"]) == ("warning", "id-7")


@pytest.mark.parametrize("form", ["text", "json"])
def test_tracebacks_forge_no_line(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(form, "info")
    try:
        raise ValueError(NASTY)
    except ValueError:
        log.exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" in "".join(lines)
    if form == "json":
        assert len(lines) == 1
        assert NASTY in json.loads(lines[0])["exception"]
    else:
        assert all(line.startswith("    ") for line in lines[1:])
        assert all(line.isprintable() for line in lines)


def test_nobody_elses_lines_are_touched(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    logs.configure("json", "info")
    root, serve = logging.getLogger(), logging.getLogger("ray.serve")
    assert not [h for h in (*root.handlers, *serve.handlers) if isinstance(h, logs.StderrHandler)]
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1
