"""API keys: who may use the service, and who may look into it."""

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
LOOK_EVERY_S = 1.0
NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")


class Refused(PermissionError):
    """No API key, or not one of ours (HTTP 401)."""


class Forbidden(PermissionError):
    """A key of ours that may not do this (HTTP 403)."""


@dataclass(frozen=True)
class Key:
    """One line of the key file. The key itself is not kept, only its SHA-256."""

    digest: bytes
    scopes: frozenset[str]
    id: str  # the name given to it, or the digest's first 8 hex digits: what logs may say


def read_keys(path: Path | None) -> tuple[Key, ...]:
    """The keys of a file, `KEY [SCOPES] [NAME]` a line; blank lines and lines that begin with # do not count.

    SCOPES is `infer` (the default), `admin` or `infer,admin`. Raises ValueError for a line that is none of this,
    and for a file without a key: it would lock everybody out, or nobody. No message holds a key.
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
                    raise ValueError("the key of an earlier line again")
            except ValueError as error:
                raise ValueError(f"api_key_file: {path}, line {number}: {error}") from None
            keys[key.digest] = key
    if not keys:
        raise ValueError(f"api_key_file: {path} holds no key")
    return tuple(keys.values())


def parse_key(line: str) -> Key:
    """One line of the file; raises ValueError."""
    key, *rest = line.split()
    scopes = rest[0].split(",") if rest else ["infer"]
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise ValueError(f"{unknown[0][:32]!r} is no scope; KEY [infer|admin|infer,admin] [NAME] is expected")
    digest = hashlib.sha256(key.encode()).digest()
    if len(rest) > 2 or (len(rest) == 2 and not NAME.fullmatch(rest[1])):
        raise ValueError("a name is one word of at most 32 letters, digits, dots, dashes and underscores")
    return Key(digest, frozenset(scopes), rest[1] if len(rest) == 2 else digest.hex()[:8])


class KeyRing:
    """The keys of a file that may change: rotating a key needs no restart.

    The file is looked at when a request comes, at most once a second. A new one that is not usable changes nothing
    and is logged once: what was good stays good. Without a file every route is open, those of operators too. Raises
    what read_keys raises.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = path, clock
        self.stamp = self._stamp()  # before the keys: a file that changes in between is read again
        self.keys = read_keys(path)
        self.looked = clock()

    def find(self, given: str) -> Key | None:
        """The key that equals `given`, the text of an HTTP header."""
        self._look()
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        # every key is compared, and digests of one length: the time taken says nothing of any of them
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches else None

    def _look(self) -> None:
        now = self.clock()
        if self.path is None or now - self.looked < LOOK_EVERY_S:
            return
        self.looked = now
        stamp = self._stamp()
        if stamp == self.stamp:
            return
        self.stamp = stamp
        try:
            self.keys = read_keys(self.path)
            log.info("read %d API keys anew", len(self.keys))
        except (OSError, ValueError) as error:
            log.error("the API keys stay as they were: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        """What differs between two versions of the file; None where there is no file."""
        try:
            stat = self.path.stat() if self.path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None


async def require_key(request: Request) -> None:
    """Raises Refused or Forbidden unless the request carries `Authorization: Bearer KEY` with a key for `infer`."""
    require(request, "infer")


async def require_admin(request: Request) -> None:
    """The same for `admin`."""
    require(request, "admin")


def require(request: Request, scope: str) -> None:
    """Leaves the key's id, "" where no key is asked for, in `request.state.key_id`."""
    ring: KeyRing = request.app.state.keys
    request.state.key_id = ""
    if ring.path is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not given.strip():
        raise Refused("Authorization: no key was sent; expected 'Authorization: Bearer KEY'")
    key = ring.find(given.strip())
    if key is None:
        raise Refused("Authorization: the key is not known to this service")
    request.state.key_id = key.id
    if scope not in key.scopes:
        raise Forbidden(f"Authorization: the key may {' and '.join(sorted(key.scopes))}, and this asks for {scope}")
