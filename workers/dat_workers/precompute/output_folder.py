"""The folder that a job writes: whole shards, a manifest entry for each, and the recipe of all of them.

    DST/precompute.json                    the recipe
    DST/train-000000.tar                   a shard
    DST/manifest/train-000000.tar.json     its manifest entry, written after the shard
    DST/.precompute-JOB/                   the unfinished files of a running job, renamed when they are whole
    DST/.precompute-JOB.lock               locked as long as the job lives

Each shard has an entry of its own: writing one takes the same time whatever the number of shards, and jobs that
share a folder never write the same file, unless they make the same shard, with the same bytes (on hosts of one
kind: other processors may round differently).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from dat_client.dataset_format.manifest import (
    MANIFEST_FOLDER,
    RECIPE_FILE,
    ManifestEntry,
    entry_path,
    shard_of_entry,
)
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.shards import ShardWriter, source_sha256
from dat_workers.precompute.sources import Shard, file_sha256, is_object_store, open_address

JOB_PREFIX = ".precompute-"


class OtherRecipe(ValueError):
    """DST was made with another codec or other settings."""


class OutputFolder:
    """A folder of shards, at a path or an fsspec address; `job` names the job that writes.

    On storage other than this machine's own, a shard is written to a temporary file here and sent when it is whole:
    object stores hold an object as a whole or not at all.
    """

    def __init__(self, address: str, job: str | None = None) -> None:
        self.address = address
        self.fs, self.path = open_address(address)
        self.path = self.path.rstrip("/") or "/"
        self.local = isinstance(self.fs, LocalFileSystem)
        self.job = job or secrets.token_hex(4)
        self.shared = False  # whether another job was writing here when this one began
        self._scratch = Path(self.path) / f"{JOB_PREFIX}{self.job}"
        self._lock_path = self._scratch.with_name(f"{self._scratch.name}.lock")
        self._lock: IO[str] | None = None

    @property
    def full_address(self) -> str:
        """The absolute address with its protocol: the same in every process."""
        return str(self.fs.unstrip_protocol(self.path))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def begin(self) -> None:
        """Creates the folder, checks that it is writable and removes what dead jobs have left. Raises OSError."""
        if not is_object_store(self.full_address):  # there, makedirs would create a bucket, even of a misspelt name
            self.fs.makedirs(self.at(MANIFEST_FOLDER), exist_ok=True)
        if not self.local:
            probe = f"{MANIFEST_FOLDER}/.{self.job}"
            self.write(probe, b"")  # fails at once where writing is not allowed
            self.fs.rm_file(self.at(probe))
            return
        for path in Path(self.path).glob(f"{JOB_PREFIX}*.lock"):
            lock = try_lock(path)
            if lock is not None:  # its job is dead
                remove_scratch(path, lock)
            else:
                self.shared = True
        while self._lock is None:  # another job may have removed the file before we locked it
            self._lock = try_lock(self._lock_path)
        self._scratch.mkdir()

    def end(self) -> None:
        """Removes this job's unfinished files and its lock."""
        if self._lock is not None:
            remove_scratch(self._lock_path, self._lock)
            self._lock = None

    def settle_recipe(self, recipe: Recipe, shards: Sequence[Shard], *, overwrite: bool = False) -> None:
        """Writes the recipe, or checks that the folder has the same one. Raises OtherRecipe.

        `overwrite` replaces another recipe, and removes the shards that were made by it.
        """
        present = self.recipe()
        if present is None and not overwrite:
            foreign = {self.at(shard.name) for shard in shards} & set(self.fs.find(self.path))
            if foreign:
                raise OtherRecipe(f"{min(foreign)} is there and was not made by dat; another DST, or --overwrite")
        if present is None and self._create(RECIPE_FILE, recipe.to_json().encode()):
            return
        present = present or self.recipe()
        if present == recipe:
            return
        differences = present.differences(recipe) if present else "none that can be read"
        if not overwrite and self.shard_names():
            raise OtherRecipe(
                f"{self.address} was made with other settings ({differences}); another DST, or --overwrite"
            )
        if self.shared:
            raise OtherRecipe(f"{self.address} is being written by another job with other settings ({differences})")
        for entry in list(self.entries()):
            if entry.settings != recipe.id:
                self.remove_file(entry_path(entry.shard))  # first: a shard without an entry does not count
                self.remove_file(entry.shard)
        self.write(RECIPE_FILE, recipe.to_json().encode())

    def recipe(self) -> Recipe | None:
        """Returns the recipe of the folder, None where it has none. Raises OtherRecipe for one it cannot read."""
        try:
            return Recipe.from_json(self.fs.cat_file(self.at(RECIPE_FILE)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise OtherRecipe(f"{self.at(RECIPE_FILE)} is not of this version of dat: {error}") from error

    def shard_names(self) -> set[str]:
        """Returns the names of all shards in the manifest."""
        root = self.at(MANIFEST_FOLDER)
        return set(filter(None, (shard_of_entry(path.removeprefix(root)) for path in self.fs.find(root))))

    def entries(self) -> Iterator[ManifestEntry]:
        """Yields all manifest entries that can be read, by name."""
        return filter(None, map(self.entry, sorted(self.shard_names())))

    def entry(self, name: str) -> ManifestEntry | None:
        """Returns the manifest entry of a shard; None where there is none that can be read."""
        try:
            return ManifestEntry.from_json(self.fs.cat_file(self.at(entry_path(name))))
        except (FileNotFoundError, ValueError):
            return None

    def finished_entry(self, shard: Shard, recipe: Recipe, *, hashes: bool = False) -> ManifestEntry | None:
        """Returns the entry of a shard that is finished; None for a shard that must be made (again).

        A shard is finished when the recipe, the source and the file are those of its entry. Source and file are
        compared by length, and with `hashes` by SHA-256 too. Raises OtherRecipe for a shard of another source.
        """
        entry = self.entry(shard.name)
        if entry is None or entry.settings != recipe.id:
            return None
        source, source_bytes, sha256 = entry.source
        if source_bytes != shard.nbytes or ("#" in shard.origin and source != shard.origin):
            if source.partition("#")[0] != shard.address:
                message = f"{self.at(shard.name)} was made of {source}, now {shard.address}"
                raise OtherRecipe(f"{message}; another DST, or remove it")
            return None
        path = self.at(shard.name)
        try:
            if self.fs.size(path) != entry.nbytes:
                return None
            if hashes and (file_sha256(self.fs, path) != entry.sha256 or source_sha256(shard) != sha256):
                return None
        except FileNotFoundError:
            return None
        return entry

    @contextmanager
    def writing(self, name: str) -> Iterator[ShardWriter]:
        """Yields a shard, which takes its name if the block ends well and else leaves nothing. Raises OSError."""
        if self.local:
            with self._new_file(lambda path: self._rename(path, name)) as file, ShardWriter(file) as writer:
                yield writer
            return
        with tempfile.TemporaryFile() as file:  # it has no name: a job that is killed leaves nothing of it
            with ShardWriter(file) as writer:
                yield writer
            file.flush()
            self.fs.put_file(f"/dev/fd/{file.fileno()}", self.at(name))

    def record(self, entry: ManifestEntry) -> None:
        """Writes the manifest entry of a shard that is finished."""
        self.write(entry_path(entry.shard), entry.to_json())

    def has(self, name: str) -> bool:
        return bool(self.fs.exists(self.at(name)))

    def remove_file(self, name: str) -> None:
        """Removes a file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.at(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file as a whole, replacing an older one. Raises OSError."""
        if not self.local:
            self.fs.pipe_file(self.at(name), content)
            return
        with self._new_file(lambda path: self._rename(path, name)) as file:
            file.write(content)

    def _create(self, name: str, content: bytes) -> bool:
        """Writes a file unless it exists, and returns whether it did.

        Of two jobs that begin at once only one does, but on an object store both.
        """
        if not self.local:
            self.write(name, content)
            return True
        try:
            with self._new_file(lambda path: os.link(path, self.at(name))) as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _new_file(self, publish: Callable[[Path], None]) -> Iterator[IO[bytes]]:
        """Yields a temporary file of this job, and publishes it when the block has ended well."""
        if not self._scratch.is_dir():
            raise OSError(
                f"{self._scratch} is not on this host: DST must be a folder that all hosts share, or s3://..."
            )
        temporary = self._scratch / secrets.token_hex(8)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def _rename(self, temporary: Path, name: str) -> None:
        final = Path(self.at(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, final)


def try_lock(path: Path) -> IO[str] | None:
    """Locks a file, which is created if needed, until this process ends; returns None where another one has it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):  # locked, or removed by the process that had locked it
        pass
    except OSError as error:
        file.close()
        raise OSError(f"{path}: this file system has no locks ({error}); write elsewhere and copy") from error
    file.close()
    return None


def remove_scratch(lock_path: Path, lock: IO[str]) -> None:
    """Removes the unfinished files of a job whose lock we hold, and then the lock itself."""
    folder = lock_path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # a dying worker may have written into it meanwhile; then the lock must stay too
        lock_path.unlink(missing_ok=True)
    lock.close()
