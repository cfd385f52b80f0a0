"""Samples of one input shard, one after the other: key, fields, and what is wrong with them."""

from __future__ import annotations

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Self

from dat_workers.images.encoded import SUFFIXES
from dat_workers.precompute.sources import Shard, file_sha256, opened

# webdataset's rule: a key goes up to the first dot of the file's name, the rest is the field
NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
READ_AT_ONCE = 1 << 20
MAX_FIELD_BYTES = 1 << 30
# what tarfile raises of headers that are nonsense, and of streams that are
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError)


@dataclass
class Sample:
    """Fields in the order of the shard; `problem` where it cannot be used."""

    key: str
    fields: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.fields.values()))


class Damaged(Exception):
    """The shard ends before its end; what came before can be used, but for sample `key`, which was being read."""

    def __init__(self, why: str, key: str) -> None:
        self.key = key
        super().__init__(why)


class Reader:
    """Samples of a shard, and `nbytes` and `sha256` of what was read of the source so far: in the end, of all.

    >>> [sample.key for sample in Reader(shard)]         # doctest: +SKIP

    Iterating raises Damaged after the last whole sample of a tar that is none or is cut off, and OSError.
    """

    def __init__(self, shard: Shard, classes: tuple[str, ...] | None = None) -> None:
        self.shard = shard
        self.classes = {name: i for i, name in enumerate(classes or ())}
        self.nbytes = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def count(self, data: bytes) -> None:
        """Takes note of bytes that were read."""
        self.nbytes += len(data)
        self._digest.update(data)

    def __iter__(self) -> Iterator[Sample]:
        seen: set[str] = set()
        for sample in self._from_files() if self.shard.files else self._from_tar():
            if sample.key in seen and not sample.problem:
                sample.problem = "the key was there before in this shard"
            seen.add(sample.key)
            yield sample

    def _from_files(self) -> Iterator[Sample]:
        fs, folder = opened(self.shard.address)
        for name in self.shard.files:
            head, _, file = name.rpartition("/")
            stem, _, suffix = file.rpartition(".")
            key = f"{head}/" * bool(head) + stem.replace(".", "_")  # its dots would be taken for the key's end
            try:
                data: bytes = fs.cat_file(f"{folder.rstrip('/')}/{name}")
            except OSError as error:
                yield Sample(key, problem=str(error))
                continue
            self.count(data)
            fields = {suffix.lower(): data}
            if self.classes:
                fields["cls"] = str(self.classes[name.split("/")[0]]).encode()
            yield Sample(key, fields)

    def _from_tar(self) -> Iterator[Sample]:
        fs, path = opened(self.shard.address)
        sample: Sample | None = None
        with fs.open(path, "rb") as file:
            raw = Counted(file, self)
            try:
                for name, data in self._files(raw):
                    match = NAME.match(name)
                    if match is None:  # no field: webdataset leaves such files out too
                        continue
                    key, suffix = match[1], match[2].lower()
                    if sample is None or key != sample.key:
                        if sample is not None:
                            yield sample
                        sample = Sample(key)
                    if suffix in sample.fields:
                        sample.problem = f"the field {suffix} is there twice"
                    if data is None:
                        sample.problem = f"the field {suffix} has more than {MAX_FIELD_BYTES} bytes"
                    else:
                        sample.fields[suffix] = data
            except DAMAGE as error:
                raw.drain()
                # files of this sample may be missing
                raise Damaged(f"damaged shard: {error}", sample.key if sample is not None else "") from error
            raw.drain()
        if sample is not None:
            yield sample

    def _files(self, raw: Counted) -> Iterator[tuple[str, bytes | None]]:
        options: dict[str, Any] = {"mode": "r|*", "bufsize": READ_AT_ONCE, "tarinfo": Header}
        opening: Any = tarfile.open
        with opening(fileobj=raw, **options) as tar:
            for member in tar:
                if member.isfile():
                    content = tar.extractfile(member)
                    yield member.name, content.read() if member.size <= MAX_FIELD_BYTES else None
                tar.members.clear()  # tarfile would keep all it has seen
            while rest := tar.fileobj.read(READ_AT_ONCE):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("there is something after the end of the archive")


class Header(tarfile.TarInfo):
    """tarfile takes whatever is no header, and the end of the file, for the end of the archive. Only zeros are."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, where a header or the archive's end should be") from error


class Counted:
    """A file whose reader is told what is read of it."""

    def __init__(self, raw: IO[bytes], reader: Reader) -> None:
        self._raw, self._reader = raw, reader

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self._reader.count(data)
        return data

    def drain(self) -> None:
        """Reads what is left."""
        while self.read(READ_AT_ONCE):
            pass


def sha256_of(shard: Shard) -> str:
    """Of a source as it is now; what `Reader.sha256` says in the end. Raises OSError."""
    if not shard.files:
        return file_sha256(*opened(shard.address))
    reader = Reader(shard)
    for _ in reader:
        pass
    return reader.sha256


def picture_field(sample: Sample) -> str:
    """The field that holds the sample's picture. Raises ValueError where there is none, or more than one."""
    found = [name for name in sample.fields if f".{name}".endswith(SUFFIXES)]
    plain = [name for name in found if "." not in name]
    if len(plain) == 1:
        return plain[0]
    if len(found) == 1:
        return found[0]
    there: Any = ", ".join(sample.fields) or "nothing"
    raise ValueError(
        f"{'several pictures' if found else 'no picture'} ({', '.join(SUFFIXES)}) among its fields: {there[:200]}"
        + ("; keys end at the first dot of a name" if found else "")
    )
