"""Log lines of the service: text, or one JSON object per line; both name the id of the request."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

REQUEST_ID: ContextVar[str] = ContextVar("dat_request_id", default="")


def configure(log_format: str, level: str) -> None:
    """Sends the records of the loggers `dat_service` and `dat_workers`, and of no others, to stderr.

    `log_format` is `text` or `json`. The fields of a record are given by `extra={"fields": {...}}`. May be
    called again.
    """
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for logger in map(logging.getLogger, ("dat_service", "dat_workers")):
        for old in [h for h in logger.handlers if isinstance(h, StderrHandler)]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False


class StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the moment of writing, because Ray and pytest replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def one_line(text: str) -> str:
    """Escapes every character that could begin a new line or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z WARNING dat_service [request id] message key=value`, then an indented traceback."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = one_line(REQUEST_ID.get()) or "-"
        line = (
            f"{timestamp(record)} {record.levelname} {record.name} [{request_id}] {one_line(record.getMessage())}"
        )
        for name, value in fields(record).items():
            text = one_line(str(value))
            line += f" {name}={json.dumps(text) if ' ' in text or '=' in text or not text else text}"
        # An exception's message may hold a line that a client made up: indented, it cannot pass for a log line.
        return "\n".join([line, *(f"    {one_line(below)}" for below in self._traceback(record).splitlines())])

    def _traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(TextFormatter):
    """One JSON object: time, level, logger, request_id, message, and if there are any, fields and exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": REQUEST_ID.get(),
            "message": record.getMessage(),
        }
        if extra := fields(record):
            entry["fields"] = extra
        if traceback := self._traceback(record):
            entry["exception"] = traceback
        return json.dumps(entry, default=str)  # ASCII only, so that no character in it can end the line


def timestamp(record: logging.LogRecord) -> str:
    """Returns the record's time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the fields that the caller gave by `extra={"fields": ...}`."""
    extra = getattr(record, "fields", None)
    return extra if isinstance(extra, dict) else {}
