"""Reads the samples of one source shard, and writes those of one output shard."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any, Self

from dat_client.dataset_format.naming import key_and_suffix
from dat_client.dataset_format.tar_samples import Sample, samples_in_tar
from dat_workers.precompute.sources import Shard, file_sha256, open_address


class ShardReader:
    """Iterates over the samples of a source shard, counting and hashing what it reads.

    >>> [sample.key for sample in ShardReader(shard)]         # doctest: +SKIP

    `nbytes` and `sha256` describe the bytes read so far, and after the last sample the whole source. For a damaged
    tar, iterating yields the samples before the damage and then raises DamagedShard. It raises OSError if the
    source cannot be read.
    """

    def __init__(self, shard: Shard, classes: tuple[str, ...] | None = None) -> None:
        self.shard = shard
        self.classes = {name: i for i, name in enumerate(classes or ())}
        self.nbytes = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self, size: int = -1, /) -> bytes:
        """Reads, counts and hashes bytes of the tar; tarfile calls it."""
        return self._count(self._file.read(size))

    def _count(self, data: bytes) -> bytes:
        self.nbytes += len(data)
        self._digest.update(data)
        return data

    def __iter__(self) -> Iterator[Sample]:
        keys: set[str] = set()
        for sample in self._from_files() if self.shard.files else self._from_tar():
            if sample.key in keys and not sample.problem:
                sample.problem = "the key was there before in this shard"
            keys.add(sample.key)
            yield sample

    def _from_files(self) -> Iterator[Sample]:
        fs, folder = open_address(self.shard.address)
        for name in self.shard.files:
            key, suffix = key_and_suffix(name)
            try:
                data = self._count(fs.cat_file(f"{folder.rstrip('/')}/{name}"))
            except OSError as error:
                yield Sample(key, problem=str(error))
                continue
            fields = {suffix: data}
            if self.classes:
                fields["cls"] = str(self.classes[name.split("/")[0]]).encode()
            yield Sample(key, fields)

    def _from_tar(self) -> Iterator[Sample]:
        fs, path = open_address(self.shard.address)
        with fs.open(path, "rb") as file:
            self._file = file
            yield from samples_in_tar(self)


def source_sha256(shard: Shard) -> str:
    """Returns the SHA-256 of a source as it is now, as `ShardReader.sha256` computes it. Raises OSError."""
    if not shard.files:
        return file_sha256(*open_address(shard.address))
    reader = ShardReader(shard)
    for _ in reader:
        pass
    return reader.sha256


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
