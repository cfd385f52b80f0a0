"""Log lines of the service: text for people or one JSON object each, with the request's id in both."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

REQUEST_ID: ContextVar[str] = ContextVar("dat_request_id", default="")


def configure(form: str, level: str) -> None:
    """Sends the loggers `dat_service` and `dat_workers`, and nobody else's, to stderr; `form` is `text` or `json`.

    A record's fields are what `extra={"fields": {...}}` gives. May be called again.
    """
    handler = Stderr()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for logger in map(logging.getLogger, ("dat_service", "dat_workers")):
        for old in [h for h in logger.handlers if isinstance(h, Stderr)]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False


class Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment: Ray and pytest put others in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        raise AttributeError("the stream is sys.stderr")


def one_line(text: str) -> str:
    """`text` with whatever could begin a new line or move a terminal's cursor escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00.000Z WARNING dat_service [request id] message key=value`, a traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{moment(record)} {record.levelname} {record.name} [{one_line(REQUEST_ID.get()) or '-'}] "
        said = one_line(record.getMessage())
        for name, value in fields(record).items():
            text = one_line(str(value))
            said += f" {name}={json.dumps(text) if ' ' in text or '=' in text or not text else text}"
        # a line that a stranger put into an exception's message is indented as well, and so passes for no other
        below = [f"    {one_line(line)}" for line in self._traceback(record).splitlines()]
        return "\n".join([head + said, *below])

    def _traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonLines(TextLines):
    """A JSON object a line: time, level, logger, request_id, message; fields and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": REQUEST_ID.get(),
            "message": record.getMessage(),
        }
        if extra := fields(record):
            said["fields"] = extra
        if traceback := self._traceback(record):
            said["exception"] = traceback
        return json.dumps(said, default=str)  # in ASCII, so that nothing in it ends the line


def moment(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What `extra={"fields": ...}` gave."""
    given = getattr(record, "fields", None)
    return given if isinstance(given, dict) else {}
