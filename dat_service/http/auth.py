"""Checks API keys. The scope `infer` allows using the codec; `admin` allows reading metrics and status."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

log = logging.getLogger("dat_service")

SCOPES = ("infer", "admin")
CHECK_EVERY_S = 1.0  # the shortest time between two checks of the key file for changes
NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")


class InvalidKey(PermissionError):
    """The request has no API key, or its key is unknown (HTTP 401; `invalid_token` in RFC 6750)."""


class InsufficientScope(PermissionError):
    """The API key is known, but its scopes do not allow the request (HTTP 403; RFC 6750)."""


@dataclass(frozen=True)
class Key:
    """An API key with its scopes and name. Of the key itself, only the SHA-256 digest is stored."""

    digest: bytes
    scopes: frozenset[str]
    id: str  # used in logs: the key's name in the file, else the first 8 hex digits of its digest


def read_keys(path: Path | None) -> tuple[Key, ...]:
    """Returns the keys in a file, or no keys if `path` is None.

    Each line has the form `KEY [SCOPES] [NAME]`, where SCOPES is `infer` (the default), `admin` or `infer,admin`.
    Blank lines and lines that begin with # are skipped. Raises ValueError for a line that does not have this form,
    for a key that occurs twice, and for a file without any key, because it would lock out every client. Raises
    OSError if the file cannot be read. No message of an error contains a key.
    """
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"api_key_file: {path} is not UTF-8 text, at byte {error.start}") from None
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                key = parse_key(line)
                if key.digest in keys:
                    raise ValueError("the key is the same as on an earlier line")
            except ValueError as error:
                raise ValueError(f"api_key_file: {path}, line {number}: {error}") from None
            keys[key.digest] = key
    if not keys:
        raise ValueError(f"api_key_file: {path} contains no key; expected at least one")
    return tuple(keys.values())


def parse_key(line: str) -> Key:
    """Returns the key that one line of the file defines. Raises ValueError if the line is malformed."""
    key, *rest = line.split()
    scopes = rest[0].split(",") if rest else ["infer"]
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise ValueError(f"{unknown[0][:32]!r} is not a scope; expected KEY [infer|admin|infer,admin] [NAME]")
    digest = hashlib.sha256(key.encode()).digest()
    if len(rest) > 2 or (len(rest) == 2 and not NAME.fullmatch(rest[1])):
        raise ValueError("a name must be one word of at most 32 letters, digits, dots, dashes and underscores")
    return Key(digest, frozenset(scopes), rest[1] if len(rest) == 2 else digest.hex()[:8])


class KeyRing:
    """Holds the keys of a file and reads the file again when it changes, so new keys need no restart.

    When a request arrives, the file is checked for changes, at most once a second. If a changed file is unusable,
    the old keys stay valid and the error is logged once. If `path` is None, no route needs a key, not even the
    routes for operators. The constructor raises the errors of `read_keys`.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = path, clock
        self.stamp = self._stamp()  # taken first, so that a change while the file is read is noticed later
        self.keys = read_keys(path)
        self.checked_s = clock()

    def find(self, text: str) -> Key | None:
        """Returns the key whose text is `text`, as Starlette decodes it from a header (Latin-1), or None."""
        self._reload()
        digest = hashlib.sha256(text.encode("latin-1")).digest()
        # Every key is compared, and all digests have one length, so that the time taken reveals nothing about them.
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches else None

    def _reload(self) -> None:
        now = self.clock()
        if self.path is None or now - self.checked_s < CHECK_EVERY_S:
            return
        self.checked_s = now
        stamp = self._stamp()
        if stamp == self.stamp:
            return
        self.stamp = stamp
        try:
            self.keys = read_keys(self.path)
            log.info("the API key file has changed and now contains %d keys", len(self.keys))
        except (OSError, ValueError) as error:
            log.error("the changed API key file is unusable, so the old keys stay valid: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        """Returns a value that changes when the file changes, or None if the file does not exist."""
        try:
            stat = self.path.stat() if self.path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None


async def require_key(request: Request) -> None:
    """Raises InvalidKey or InsufficientScope unless the request has a key with the scope `infer`."""
    require(request, "infer")


async def require_admin(request: Request) -> None:
    """Raises InvalidKey or InsufficientScope unless the request has a key with the scope `admin`."""
    require(request, "admin")


def require(request: Request, scope: str) -> None:
    """Checks the key in `Authorization: Bearer KEY`, and stores the id of the key in `request.state.key_id`.

    If the service has no key file, every request is allowed and the id is "". Raises InvalidKey if the key is
    missing or unknown, and InsufficientScope if the key does not have the scope.
    """
    ring: KeyRing = request.app.state.keys
    request.state.key_id = ""
    if ring.path is None:
        return
    kind, _, key_text = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not key_text.strip():
        raise InvalidKey("Authorization: the request has no API key; expected 'Authorization: Bearer KEY'")
    key = ring.find(key_text.strip())
    if key is None:
        raise InvalidKey("Authorization: this service does not know the API key of the request")
    request.state.key_id = key.id
    if scope not in key.scopes:
        raise InsufficientScope(
            f"Authorization: the API key has the scope {' and '.join(sorted(key.scopes))}, this route needs {scope}"
        )
