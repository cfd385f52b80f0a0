"""DST: shards that are whole or not there, an entry for each in a manifest, and the recipe of all of them.

    DST/precompute.json                    the recipe
    DST/train-000000.tar                   a shard
    DST/manifest/train-000000.tar.json     its entry, written after it: what it holds, and what it was made of
    DST/.precompute-JOB/                   what a running job writes, before it is renamed
    DST/.precompute-JOB.lock               held as long as the job lives

An entry a shard, and no list of all: writing one takes the same time whatever number there is, and jobs that
share a folder do not write the same file, but where they make the same shard, with the same bytes (on hosts of one
kind: another processor may round otherwise).
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from fsspec.implementations.local import LocalFileSystem

from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.samples import sha256_of
from dat_workers.precompute.sources import Shard, file_sha256, of_objects, opened

RECIPE, MANIFEST, JOBS = "precompute.json", "manifest", ".precompute-"
SOURCE = ("name", "bytes", "sha256")


class OtherRecipe(ValueError):
    """DST was made with another codec or other settings."""


@dataclass(frozen=True)
class Entry:
    """A shard in the manifest; `skipped`: (key, reason), `source`: (address, bytes, SHA-256) as they were."""

    shard: str
    samples: int
    nbytes: int
    sha256: str
    settings: str
    skipped: tuple[tuple[str, str], ...]
    source: tuple[str, int, str]

    def to_json(self) -> bytes:
        said = asdict(self)
        said |= {
            "bytes": said.pop("nbytes"),
            "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
            "source": dict(zip(SOURCE, self.source, strict=True)),
        }
        return (json.dumps(said, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises ValueError, KeyError or TypeError for what is no entry."""
        said = json.loads(text)
        said["skipped"] = tuple((one["key"], one["reason"]) for one in said["skipped"])
        said["nbytes"] = said.pop("bytes")
        said["source"] = tuple(said["source"][name] for name in SOURCE)
        return cls(**said)


class Folder:
    """A folder of shards, at a path or an fsspec address; `job` names who writes.

    Where the storage is not this machine's own, a shard is written to a temporary file here, and sent when it is
    whole: an object is there as a whole or not at all.
    """

    def __init__(self, address: str, job: str | None = None) -> None:
        self.address = address
        self.fs, self.path = opened(address)
        self.path = self.path.rstrip("/") or "/"
        self.local = isinstance(self.fs, LocalFileSystem)
        self.job = job or secrets.token_hex(4)
        self.others = False  # whether another job was writing here when this one began
        self._lock: IO[str] | None = None

    @property
    def full_address(self) -> str:
        """With its protocol, and absolute: the same in every process."""
        return str(self.fs.unstrip_protocol(self.path))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    @property
    def _scratch(self) -> Path:
        return Path(self.path) / f"{JOBS}{self.job}"

    @property
    def _lock_path(self) -> Path:
        return self._scratch.with_name(f"{self._scratch.name}.lock")

    def begin(self) -> None:
        """Makes the folder, sees that it can be written, clears away what dead jobs have left. Raises OSError."""
        if not of_objects(self.full_address):  # there it would make a bucket, of a misspelt name too
            self.fs.makedirs(self.at(MANIFEST), exist_ok=True)
        if not self.local:
            self._put(f"{MANIFEST}/.{self.job}", b"")  # says at once that it may not be written
            self.fs.rm_file(self.at(f"{MANIFEST}/.{self.job}"))
            return
        for left in Path(self.path).glob(f"{JOBS}*.lock"):
            lock = held(left)
            if lock is not None:  # its job is dead
                clear(left, lock)
            else:
                self.others = True
        while self._lock is None:  # somebody may have cleared it away before it was held
            self._lock = held(self._lock_path)
        self._scratch.mkdir()

    def end(self) -> None:
        """Takes away what this job has left beside its shards."""
        if self._lock is not None:
            clear(self._lock_path, self._lock)
            self._lock = None

    def settle(self, recipe: Recipe, shards: Sequence[Shard], *, overwrite: bool = False) -> None:
        """Writes the recipe, or sees that it is the one that is there. Raises OtherRecipe.

        `overwrite` lets another one stand in its place, and removes the shards that were made by it.
        """
        theirs = self.recipe()
        if theirs is None and not overwrite:
            there = {self.at(shard.name) for shard in shards} & set(self.fs.find(self.path))
            if there:
                raise OtherRecipe(f"{min(there)} is there and was not made by dat; another DST, or --overwrite")
        if theirs is None and self._create(RECIPE, recipe.to_json().encode()):
            return
        theirs = theirs or self.recipe()
        if theirs == recipe:
            return
        said = theirs.differences(recipe) if theirs else "none that can be read"
        if not overwrite and self.names():
            raise OtherRecipe(f"{self.address} was made with other settings ({said}); another DST, or --overwrite")
        if self.others:
            raise OtherRecipe(f"{self.address} is being written by another job with other settings ({said})")
        for entry in list(self.entries()):
            if entry.settings != recipe.id:
                self.remove(entry.shard)
        self._put(RECIPE, recipe.to_json().encode())

    def recipe(self) -> Recipe | None:
        """What the folder was made with; None where nothing was. Raises OtherRecipe for what is no recipe."""
        try:
            return Recipe.from_json(self.fs.cat_file(self.at(RECIPE)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise OtherRecipe(f"{self.at(RECIPE)} is not of this version of dat: {error}") from error

    def entries(self) -> Iterator[Entry]:
        """All of the manifest that can be read, by name."""
        for name in sorted(self.names()):
            entry = self.entry(name)
            if entry is not None:
                yield entry

    def entry(self, name: str) -> Entry | None:
        """What the manifest says of a shard; None where it says nothing that can be read."""
        try:
            return Entry.from_json(self.fs.cat_file(self.at(f"{MANIFEST}/{name}.json")))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def done(self, shard: Shard, recipe: Recipe, *, hashes: bool = False) -> Entry | None:
        """The entry of a shard that need not be made again: entry, recipe, source and file agree.

        Of source and file the length is compared, and with `hashes` the SHA-256 too. Raises OtherRecipe for a shard
        that was made of another source.
        """
        entry = self.entry(shard.name)
        if entry is None or entry.settings != recipe.id:
            return None
        if entry.source[1] != shard.nbytes or ("#" in shard.origin and entry.source[0] != shard.origin):
            if entry.source[0].partition("#")[0] != shard.address:
                made = f"{self.at(shard.name)} was made of {entry.source[0]}"
                raise OtherRecipe(f"{made}, now {shard.address}; another DST, or remove it")
            return None
        path = self.at(shard.name)
        try:
            if self.fs.size(path) != entry.nbytes:
                return None
            if hashes and (file_sha256(self.fs, path) != entry.sha256 or sha256_of(shard) != entry.source[2]):
                return None
        except FileNotFoundError:
            return None
        return entry

    def names(self) -> set[str]:
        """Of all shards in the manifest."""
        root = self.at(MANIFEST)
        return {path.removeprefix(root).lstrip("/").removesuffix(".json") for path in self.fs.find(root)}

    def remove(self, name: str) -> None:
        """A shard and its entry; the entry first, for what has none does not count."""
        self.remove_file(f"{MANIFEST}/{name}.json")
        self.remove_file(name)

    @contextmanager
    def writing(self, name: str) -> Iterator[ShardWriter]:
        """A shard that takes its name when the block has ended well; else nothing is left. Raises OSError."""
        if not self.local:
            with tempfile.TemporaryFile() as file:  # it has no name: nothing of it is left by a job that is killed
                yield from self._written(file)
                self.fs.put_file(f"/dev/fd/{file.fileno()}", self.at(name))
            return
        if not self._scratch.is_dir():
            raise OSError(
                f"{self._scratch} is not on this host: DST must be a folder that all hosts share, or s3://..."
            )
        temporary = self._temporary()
        try:
            with temporary.open("xb") as file:
                yield from self._written(file)
            self._rename(temporary, name)
        finally:
            temporary.unlink(missing_ok=True)

    def _written(self, file: Any) -> Iterator[ShardWriter]:
        writer = ShardWriter(file)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.close()
        file.flush()
        os.fsync(file.fileno())

    def enter(self, entry: Entry) -> None:
        """Writes an entry of the manifest, of a shard that is there."""
        self._put(f"{MANIFEST}/{entry.shard}.json", entry.to_json())

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self.fs.exists(self.at(name)))

    def remove_file(self, name: str) -> None:
        """Removes a file beside the shards, where it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.at(name))

    def write(self, name: str, content: bytes) -> None:
        """A file beside the shards, as a whole."""
        self._put(name, content)

    def _put(self, name: str, content: bytes) -> None:
        if not self.local:
            self.fs.pipe_file(self.at(name), content)
            return
        with self._file(content) as temporary:
            self._rename(temporary, name)

    def _create(self, name: str, content: bytes) -> bool:
        """Writes a file unless it is there: of two jobs that begin at once, one does. (In object stores, both.)"""
        if not self.local:
            self.fs.pipe_file(self.at(name), content)
            return True
        with self._file(content) as temporary, suppress(FileExistsError):
            os.link(temporary, self.at(name))
            return True
        return False

    @contextmanager
    def _file(self, content: bytes) -> Iterator[Path]:
        """A temporary file of this job, with that content and on the disk."""
        temporary = self._temporary()
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        return self._scratch / secrets.token_hex(8)

    def _rename(self, temporary: Path, name: str) -> None:
        final = Path(self.at(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, final)


class ShardWriter:
    """A tar whose bytes depend on its samples alone: no times, no owners. `nbytes` and `sha256` when closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.nbytes = self.samples = 0
        self._tar: Any = tarfile.open(fileobj=self, mode="w|", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def add(self, key: str, fields: dict[str, bytes]) -> None:
        """One sample, its fields in the order given."""
        for name, content in fields.items():
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size, member.mode = len(content), 0o444
            self._tar.addfile(member, io.BytesIO(content))
        self._tar.members.clear()  # tarfile would keep all it has written
        self.samples += 1

    def close(self) -> None:
        self._tar.close()

    def abandon(self) -> None:
        """Writes nothing more: tarfile would, when it is collected."""
        self._file = io.BytesIO()
        self._tar.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def held(lock: Path) -> IO[str] | None:
    """The file, made where it is not there and held by this process until it ends; None where another holds it."""
    file = lock.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):  # held, or cleared away by who held it
        pass
    except OSError as error:
        file.close()
        raise OSError(f"{lock}: this file system has no locks ({error}); write elsewhere and copy") from error
    file.close()
    return None


def clear(lock: Path, file: IO[str]) -> None:
    """Removes the folder of a job that we hold the lock of, and then the lock: nothing is left without one."""
    folder = lock.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # a dying worker may have written into it meanwhile
        lock.unlink(missing_ok=True)
    file.close()
