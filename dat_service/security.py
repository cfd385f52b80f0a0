"""API keys."""

from __future__ import annotations

import hmac
from pathlib import Path

from fastapi import Request


class Refused(PermissionError):
    """No API key, or not one of ours (HTTP 401)."""


def read_keys(path: Path | None) -> tuple[bytes, ...]:
    """The keys of a file, one a line; blank lines and lines that begin with # do not count.

    Raises ValueError for a file without a key: it would lock everybody out, or nobody.
    """
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"api_key_file: {path} is not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line.encode() for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"api_key_file: {path} holds no key")
    return keys


async def require_key(request: Request) -> None:
    """Raises Refused unless the request carries `Authorization: Bearer KEY` with a known key."""
    keys: tuple[bytes, ...] = request.app.state.keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Refused("Authorization: no key was sent; expected 'Authorization: Bearer KEY'")
    # every key is compared, so that the time taken says nothing of which one came near
    matches = [hmac.compare_digest(key, given.strip().encode("latin-1")) for key in keys]
    if not any(matches):
        raise Refused("Authorization: the key is not known to this service")
