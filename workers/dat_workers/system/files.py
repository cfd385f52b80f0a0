"""Writes files atomically: a file is either complete or absent."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

STALE_S = 3600.0  # a temporary file of this age was left behind by a process that was killed


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, and renames it to `path` when the block ends without an error.

    >>> with replacing(Path("runs/a.txt")) as file:  # doctest: +SKIP
    ...     file.write(b"whole")

    The temporary file is in the same folder, and is synced before it is renamed. After an error the temporary file
    is deleted, and an older file named `path` stays as it was. Raises OSError.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # a second writer of this name may have just renamed that file
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
    """Writes `content` to `path` atomically, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)
