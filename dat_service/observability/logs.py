"""Formats the log lines of the service, as text or as one JSON object per line, with the id of the request."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

REQUEST_ID: ContextVar[str] = ContextVar("dat_request_id", default="")


def configure(log_format: str, level: str) -> None:
    """Makes the loggers `dat_service` and `dat_workers`, and only these two, write to stderr.

    `log_format` is `text` or `json`; `level` is the lowest level that is written. A caller adds fields to a log
    line with `extra={"fields": {...}}`. A second call replaces the format and the level of the first.
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
    """Looks up sys.stderr again for each line that it writes, because Ray and pytest replace sys.stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def one_line(text: str) -> str:
    """Returns the text with every character escaped that could begin a new line or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormatter(logging.Formatter):
    """Formats a record as a line of text, followed by an indented traceback if the record has an exception.

    The line has the form `2026-01-31T12:00:00.000Z WARNING dat_service [request id] message key=value`.
    """

    def format(self, record: logging.LogRecord) -> str:
        request_id = one_line(REQUEST_ID.get()) or "-"
        line = (
            f"{timestamp(record)} {record.levelname} {record.name} [{request_id}] {one_line(record.getMessage())}"
        )
        for name, value in fields(record).items():
            text = one_line(str(value))
            line += f" {name}={json.dumps(text) if ' ' in text or '=' in text or not text else text}"
        # An exception's message may contain a line that a client invented. Indented, it cannot pass for a log line.
        return "\n".join([line, *(f"    {one_line(below)}" for below in self._traceback(record).splitlines())])

    def _traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(TextFormatter):
    """Formats a record as one JSON object.

    Its keys are time, level, logger, request_id and message, and also fields and exception if the record has them.
    """

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
        return json.dumps(entry, default=str)  # it is ASCII only, so that no character in it can end the line


def timestamp(record: logging.LogRecord) -> str:
    """Returns the record's time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the fields that the caller passed as `extra={"fields": {...}}`; an empty dict if there are none."""
    extra = getattr(record, "fields", None)
    return extra if isinstance(extra, dict) else {}
