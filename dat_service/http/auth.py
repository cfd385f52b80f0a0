"""API keys: the scope `infer` allows using the codec, `admin` reading metrics and status."""

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
CHECK_EVERY_S = 1.0  # how often the key file is checked for changes, at most
NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")


class InvalidKey(PermissionError):
    """The request has no API key, or an unknown one (HTTP 401; `invalid_token` in RFC 6750)."""


class InsufficientScope(PermissionError):
    """The API key is known, but its scopes do not allow the request (HTTP 403; RFC 6750)."""


@dataclass(frozen=True)
class Key:
    """One line of the key file. Only the SHA-256 of the key is stored."""

    digest: bytes
    scopes: frozenset[str]
    id: str  # shown in logs: its name in the file, else the first 8 hex digits of the digest


def read_keys(path: Path | None) -> tuple[Key, ...]:
    """Reads a file with one key per line, `KEY [SCOPES] [NAME]`; skips blank lines and lines that begin with #.

    SCOPES is `infer` (the default), `admin` or `infer,admin`. Raises ValueError for any other line, and for a file
    without a key, which would lock out everybody. No message contains a key.
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
        raise ValueError(f"api_key_file: {path} contains no key")
    return tuple(keys.values())


def parse_key(line: str) -> Key:
    """Parses one line of the file; raises ValueError."""
    key, *rest = line.split()
    scopes = rest[0].split(",") if rest else ["infer"]
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise ValueError(f"{unknown[0][:32]!r} is not a scope; expected KEY [infer|admin|infer,admin] [NAME]")
    digest = hashlib.sha256(key.encode()).digest()
    if len(rest) > 2 or (len(rest) == 2 and not NAME.fullmatch(rest[1])):
        raise ValueError("a name is one word of at most 32 letters, digits, dots, dashes and underscores")
    return Key(digest, frozenset(scopes), rest[1] if len(rest) == 2 else digest.hex()[:8])


class KeyRing:
    """The keys of a file that may change while the service runs, so that rotating a key needs no restart.

    Requests check the file for changes, at most once a second. If a changed file is unusable, the old keys stay
    valid and the error is logged once. Without a file every route is open, also those for operators. Raises what
    read_keys raises.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = path, clock
        self.stamp = self._stamp()  # taken before reading: a file that changes in between is read again
        self.keys = read_keys(path)
        self.checked_s = clock()

    def find(self, text: str) -> Key | None:
        """Returns the key that equals `text`, which comes from an HTTP header."""
        self._reload()
        digest = hashlib.sha256(text.encode("latin-1")).digest()
        # All keys are compared, and by digests of one length, so that the time taken reveals nothing about them.
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
            log.info("the API key file has changed: %d keys", len(self.keys))
        except (OSError, ValueError) as error:
            log.error("the changed API key file is not used, the old keys stay valid: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        """Returns what differs between two versions of the file, None without a file."""
        try:
            stat = self.path.stat() if self.path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None


async def require_key(request: Request) -> None:
    """Raises InvalidKey or InsufficientScope unless the request has `Authorization: Bearer KEY` for `infer`."""
    require(request, "infer")


async def require_admin(request: Request) -> None:
    """Like `require_key`, for the scope `admin`."""
    require(request, "admin")


def require(request: Request, scope: str) -> None:
    """Checks the request's key and stores its id in `request.state.key_id`, "" if the service has no keys."""
    ring: KeyRing = request.app.state.keys
    request.state.key_id = ""
    if ring.path is None:
        return
    kind, _, key_text = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not key_text.strip():
        raise InvalidKey("Authorization: no key was sent; expected 'Authorization: Bearer KEY'")
    key = ring.find(key_text.strip())
    if key is None:
        raise InvalidKey("Authorization: the key is not known to this service")
    request.state.key_id = key.id
    if scope not in key.scopes:
        raise InsufficientScope(
            f"Authorization: the key has the scope {' and '.join(sorted(key.scopes))}, this route needs {scope}"
        )
