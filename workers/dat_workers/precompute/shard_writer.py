"""Writes the samples of one output shard."""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import IO, Any, Self


class ShardWriter:
    """Writes a tar file whose bytes depend on its samples alone, because it records no times and no owners.

    It is used as a context manager. After the block, `nbytes` and `sha256` describe the whole file. If the block
    raises, the file stays unfinished.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.nbytes = self.samples = 0
        self._tar: Any = tarfile.open(fileobj=self, mode="w|", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._file = io.BytesIO()  # tarfile would still write its buffer when it is collected
        self._tar.close()

    def write(self, data: bytes) -> int:
        """Writes and hashes bytes of the tar file; tarfile calls it."""
        self._digest.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def add(self, key: str, fields: dict[str, bytes]) -> None:
        """Adds one sample, with its fields in the order of the dict."""
        for name, content in fields.items():
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size, member.mode = len(content), 0o444
            self._tar.addfile(member, io.BytesIO(content))
        self._tar.members.clear()  # tarfile would keep every member in memory
        self.samples += 1

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
