"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Writes `content` under a temporary name beside `path`, syncs and renames it; raises OSError, leaves nothing.

    >>> write_atomically(Path("runs/a.txt"), b"whole")  # doctest: +SKIP
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
