"""The folder that a job writes: finished shards, a manifest entry for each shard, and the recipe of all shards.

    DST/precompute.json                    the recipe
    DST/train-000000.tar                   a shard
    DST/manifest/train-000000.tar.json     its manifest entry, written after the shard
    DST/.precompute-JOB/                   the unfinished files of a running job, renamed when they are complete
    DST/.precompute-JOB.lock               locked as long as the job runs

The entry of each shard is a separate file, so that the time to write it does not depend on the number of shards.
Jobs that share a folder write the same file only if they make the same shard, and then with the same bytes (if the
hosts have the same kind of processor; different processors may round differently).
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
from dat_workers.precompute.shard_writer import ShardWriter
from dat_workers.sources.addresses import file_sha256, is_object_store, open_address, real_address
from dat_workers.sources.folders import Shard
from dat_workers.sources.reader import source_sha256

JOB_PREFIX = ".precompute-"


class OtherRecipe(ValueError):
    """DST was made with a different codec, source or settings."""


class OutputFolder:
    """A folder of shards, at a path or an fsspec address; `job` is the name of the job that writes.

    On remote storage, a shard is first written to a local temporary file and uploaded when it is complete, because
    an object store holds only complete objects.
    """

    def __init__(self, address: str, job: str | None = None) -> None:
        self.address = address
        self.fs, self.path = open_address(address)
        self.path = self.path.rstrip("/") or "/"
        self.local = isinstance(self.fs, LocalFileSystem)
        self.job = job or secrets.token_hex(4)
        self.shared = False  # whether a different job was writing here when this job began
        self._scratch = Path(self.path) / f"{JOB_PREFIX}{self.job}"
        self._lock_path = self._scratch.with_name(f"{self._scratch.name}.lock")
        self._lock: IO[str] | None = None
        self._created: list[Path] = []  # the folders that `begin` made, the innermost first
        self.remade: dict[str, str] = {}  # by name, the reason why a shard that was there is made again

    @property
    def full_address(self) -> str:
        """The absolute address with its protocol, which is the same in every process."""
        return str(self.fs.unstrip_protocol(self.path))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def begin(self) -> None:
        """Creates the folder, checks that it is writable and removes the files of dead jobs. Raises OSError."""
        if not is_object_store(self.full_address):  # makedirs would create a bucket, even one with a misspelt name
            manifest = Path(self.at(MANIFEST_FOLDER))
            self._created = [path for path in (manifest, *manifest.parents) if self.local and not path.exists()]
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
        while self._lock is None:  # a different job may remove the file before this job locks it
            self._lock = try_lock(self._lock_path)
        self._scratch.mkdir()

    def end(self) -> None:
        """Removes this job's unfinished files, its lock, and the folders that it made if they are still empty."""
        if self._lock is not None:
            remove_scratch(self._lock_path, self._lock)
            self._lock = None
        if self._created and not list(Path(self.path).glob(f"{JOB_PREFIX}*")):  # no other job is writing here
            with suppress(OSError):  # the first that is not empty
                for path in self._created:
                    path.rmdir()

    def settle_recipe(self, recipe: Recipe, shards: Sequence[Shard], *, overwrite: bool = False) -> None:
        """Writes the recipe, or checks that the folder's recipe is equal. Raises OtherRecipe if it differs.

        If `overwrite` is set, a different recipe is replaced, and the shards that were made with it are removed.
        """
        try:
            present = self.recipe()
        except OtherRecipe:
            if not overwrite:
                raise
            self.remove_file(RECIPE_FILE)
            present = None
        if present is None and not overwrite:
            foreign = {self.at(shard.name) for shard in shards} & set(self.fs.find(self.path))
            if foreign:
                raise OtherRecipe(f"{min(foreign)} was not made by dat; use an empty DST, or --overwrite")
        if present is None and self._create(RECIPE_FILE, recipe.to_json().encode()):
            self._remove_shards_of_others(recipe)
            return
        present = present or self.recipe()
        if present == recipe:
            return
        differences = present.differences(recipe) if present else "none that can be read"
        if not overwrite and self.shard_names():
            raise OtherRecipe(
                f"{self.address} was made with other settings ({differences}); use an empty DST, or --overwrite"
            )
        if self.shared:
            raise OtherRecipe(f"{self.address} is being written by another job with other settings ({differences})")
        self._remove_shards_of_others(recipe)
        self.write(RECIPE_FILE, recipe.to_json().encode())

    def _remove_shards_of_others(self, recipe: Recipe) -> None:
        """Removes the shards that were made with another recipe."""
        for entry in list(self.entries()):
            if entry.settings != recipe.id:
                self.remove_file(entry_path(entry.shard))  # first: a shard without an entry counts as missing
                self.remove_file(entry.shard)

    def remove_left_behind(self, shards: Sequence[Shard]) -> tuple[str, ...]:
        """Removes the shards of the same folder of pictures that an earlier run made and that `shards` lacks.

        The folder holds fewer pictures now, and those that it still holds are in `shards`. Returns the names.
        """
        names = self.shard_names() - {shard.name for shard in shards}
        if not names or not shards[0].files:
            return ()
        source = real_address(shards[0].address)
        removed = []
        for entry in filter(None, map(self.entry, sorted(names))):
            if real_address(entry.source[0].rpartition("#")[0]) == source:
                self.remove_file(entry_path(entry.shard))  # first: a shard without an entry is not read
                self.remove_file(entry.shard)
                removed.append(entry.shard)
        return tuple(removed)

    def recipe(self) -> Recipe | None:
        """Returns the recipe of the folder, or None if there is none. Raises OtherRecipe if it cannot be read."""
        try:
            return Recipe.from_json(self.fs.cat_file(self.at(RECIPE_FILE)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise OtherRecipe(
                f"{self.at(RECIPE_FILE)} was not written by this version of dat: {error}; use an empty DST, or "
                "--overwrite"
            ) from error

    def shard_names(self) -> set[str]:
        """Returns the names of all shards in the manifest."""
        root = self.at(MANIFEST_FOLDER)
        return set(filter(None, (shard_of_entry(path.removeprefix(root)) for path in self.fs.find(root))))

    def entries(self) -> Iterator[ManifestEntry]:
        """Yields all manifest entries that can be read, sorted by name."""
        return filter(None, map(self.entry, sorted(self.shard_names())))

    def entry(self, name: str) -> ManifestEntry | None:
        """Returns the manifest entry of a shard, or None if it is absent or cannot be read."""
        try:
            return self._read_entry(name)
        except (FileNotFoundError, ValueError):
            return None

    def _read_entry(self, name: str) -> ManifestEntry:
        return ManifestEntry.from_json(self.fs.cat_file(self.at(entry_path(name))), name)

    def finished_entry(self, shard: Shard, recipe: Recipe, *, hashes: bool = False) -> ManifestEntry | None:
        """Returns the manifest entry of a finished shard, or None if the shard must be made (again).

        A shard is finished if its manifest entry matches the recipe, the source and the file. Source and file are
        compared by length, and if `hashes` is set by SHA-256 too. If they differ, `remade` gets the reason. Raises
        OtherRecipe if the shard was made from a source at a different address.
        """
        try:
            entry = self._read_entry(shard.name)
            reason = self._difference(entry, shard, recipe, hashes)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if isinstance(error, OtherRecipe):
                raise
            reason = f"its manifest entry cannot be read: {error}"
        if reason:
            self.remade[shard.name] = reason
            return None
        self.remade.pop(shard.name, None)
        return entry

    def _difference(self, entry: ManifestEntry, shard: Shard, recipe: Recipe, hashes: bool) -> str:
        """Returns in what a shard differs from its manifest entry, or "" if the shard is finished."""
        if entry.settings != recipe.id:
            return "it was made with other settings"
        source, source_bytes, sha256 = entry.source
        address, _, digest = source.rpartition("#") if shard.files else (source, "", "")
        unchanged = source_bytes == shard.nbytes and digest == shard.digest
        if not unchanged or (shard.files and address != shard.address):
            if real_address(address) != real_address(shard.address):
                message = f"{self.at(shard.name)} was made of {source}, now {shard.address}"
                raise OtherRecipe(f"{message}; choose an empty DST, or remove the shard")
            if source_bytes != shard.nbytes:
                return f"its source had {source_bytes} bytes and has {shard.nbytes} now"
            if not unchanged:
                return "its pictures have other names now"
        if not set(shard.problems) <= set(entry.skipped):
            return "its manifest entry does not list all that cannot be read in its source now"
        path = self.at(shard.name)
        try:
            nbytes = self.fs.size(path)
        except FileNotFoundError:
            return "it is not there, but its manifest entry is"
        if nbytes != entry.nbytes:
            return f"it has {nbytes} bytes, {entry.nbytes} by its manifest entry"
        if hashes and file_sha256(self.fs, path) != entry.sha256:
            return "its SHA-256 is not that of its manifest entry"
        if hashes and source_sha256(shard) != sha256:
            return "the SHA-256 of its source has changed"
        return ""

    @contextmanager
    def writing(self, name: str) -> Iterator[ShardWriter]:
        """Yields a writer; the shard appears as `name` if the block ends without an error. Raises OSError."""
        if self.local:
            with self._new_file(lambda path: self._rename(path, name)) as file, ShardWriter(file) as writer:
                yield writer
            return
        with tempfile.TemporaryFile() as file:  # it has no name, so a killed job leaves no file behind
            with ShardWriter(file) as writer:
                yield writer
            file.flush()
            self.fs.put_file(f"/dev/fd/{file.fileno()}", self.at(name))

    def record(self, entry: ManifestEntry) -> None:
        """Writes the manifest entry of a finished shard."""
        self.write(entry_path(entry.shard), entry.to_json())

    def has(self, name: str) -> bool:
        return bool(self.fs.exists(self.at(name)))

    def remove_file(self, name: str) -> None:
        """Removes a file if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.at(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file atomically, replacing an older file of that name. Raises OSError."""
        if not self.local:
            self.fs.pipe_file(self.at(name), content)
            return
        with self._new_file(lambda path: self._rename(path, name)) as file:
            file.write(content)

    def _create(self, name: str, content: bytes) -> bool:
        """Writes a file unless it exists; returns True if it wrote the file.

        If two jobs begin at the same time, only one of them writes; on an object store both do.
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
        """Yields a temporary file of this job; calls `publish` with its path if the block ends without an error."""
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
    """Creates a file if needed and locks it until this process ends; returns None if it is locked already."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):  # locked, or removed by the process that had locked it
        pass
    except OSError as error:
        file.close()
        raise OSError(
            f"{path}: this file system has no locks ({error}); choose a DST on a different one"
        ) from error
    file.close()
    return None


def remove_scratch(lock_path: Path, lock: IO[str]) -> None:
    """Removes the unfinished files of a job whose lock the caller holds, and then the lock file."""
    folder = lock_path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # if a dying worker wrote into it meanwhile, the lock must stay
        lock_path.unlink(missing_ok=True)
    lock.close()
