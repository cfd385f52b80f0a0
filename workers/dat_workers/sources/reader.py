"""Reads the samples of one source shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from dat_client.dataset_format.left_out import LeftOut
from dat_client.dataset_format.naming import key_and_suffix
from dat_client.dataset_format.tar_samples import DamagedShard, Sample, samples_in_tar
from dat_workers.sources.addresses import file_sha256, open_address
from dat_workers.sources.folders import Shard
from dat_workers.sources.kinds import FIRST_BYTES, advice_by_content


class ShardReader:
    """Iterates over the samples of a source shard, counting and hashing what it reads.

    >>> [sample.key for sample in ShardReader(shard)]         # doctest: +SKIP

    `nbytes` and `sha256` describe the bytes read so far, and after the last sample the whole source. `left_out` has
    the files of a tar that belong to no sample. The first samples stand for the shard's own problems. For a damaged
    tar, iterating yields the samples before the damage and then raises DamagedShard. It raises OSError if the
    source cannot be read.
    """

    def __init__(self, shard: Shard, classes: tuple[str, ...] | None = None) -> None:
        self.shard = shard
        self.classes = {name: i for i, name in enumerate(classes or ())}
        self.nbytes = 0
        self.left_out = LeftOut()
        self._first_bytes = b""
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self, size: int = -1, /) -> bytes:
        """Reads, counts and hashes bytes of the tar; tarfile calls it."""
        return self._count(self._file.read(size))

    def _count(self, data: bytes) -> bytes:
        if not self.nbytes:
            self._first_bytes = data[:FIRST_BYTES]
        self.nbytes += len(data)
        self._digest.update(data)
        return data

    def __iter__(self) -> Iterator[Sample]:
        keys: set[str] = set()
        yield from (Sample(key, problem=reason) for key, reason in self.shard.problems)
        for sample in self._from_files() if self.shard.files else self._from_tar():
            if sample.key in keys and not sample.problem:
                sample.problem = "the key was there before in this shard"
            keys.add(sample.key)
            yield sample

    def _from_files(self) -> Iterator[Sample]:
        fs, folder = open_address(self.shard.address)
        first_of = dict(self.shard.repeated)
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
            yield Sample(key, fields, repeated_key(first_of[name]) if name in first_of else "")

    def _from_tar(self) -> Iterator[Sample]:
        fs, path = open_address(self.shard.address)
        with fs.open(path, "rb") as file:
            self._file = file
            try:
                yield from samples_in_tar(self, self.left_out)
            except DamagedShard as error:
                advice = "" if error.key else advice_by_content(self._first_bytes)
                raise DamagedShard(f"not a tar archive, but {advice}", "") if advice else error from None


def place_of(key: str) -> str:
    """Returns a sample's place in its shard, for messages; the key "" stands for what follows the last sample."""
    return f"sample {key}" if key else "after the last sample"


def repeated_key(first: str) -> str:
    """Returns the reason why a picture of a folder is skipped whose key an earlier picture has."""
    return f"the key was there before, of {first}: rename one, so that they differ in more than the suffix"


def source_sha256(shard: Shard) -> str:
    """Returns the SHA-256 of a source as it is now, as `ShardReader.sha256` computes it. Raises OSError."""
    if not shard.files:
        return file_sha256(*open_address(shard.address))
    reader = ShardReader(shard)
    for _ in reader:
        pass
    return reader.sha256
