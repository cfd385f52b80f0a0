"""Writes files that are complete or not there."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

STALE_S = 3600.0  # a temporary file this old was left behind by a process that was killed


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes the name `path` only when the block has ended without an error.

    >>> with replacing(Path("runs/a.txt")) as file:  # doctest: +SKIP
    ...     file.write(b"whole")

    It is written under a temporary name in the same folder, synced and renamed. On an error nothing is left, and an
    older file of that name stays as it was. Raises OSError.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another writer of this name may just have renamed its own
            if time.time() - leftover.stat().st_mtime > STALE_S:
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Makes `content` the whole of `path`, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)
