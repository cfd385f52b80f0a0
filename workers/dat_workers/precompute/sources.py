"""SRC into shards: what a brace pattern, a folder or an address stands for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from dat_workers.errors import InvalidInput
from dat_workers.images.encoded import SUFFIXES
from dat_workers.precompute.recipe import short
from dat_workers.system.threads import Threads

BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "hf"}
TARS = (".tar", ".tar.gz", ".tgz")
OWN = ("builtins", "dat_workers", "ray")  # packages whose errors are no storage's
PICTURES_A_SHARD = 1000
LOOKED_AT_ONCE = 16  # shards, whether they are there: each is a question or two to a storage far away


@dataclass(frozen=True)
class Shard:
    """One input shard: `address` of a tar, or `files` below `address`, a folder of pictures.

    `name`: that of the output shard, relative to DST. `nbytes`: of the source, 0 where its storage does not say.
    """

    name: str
    address: str
    nbytes: int
    files: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """The address, and for pictures a digest of their names: what the manifest says a shard was made of."""
        if not self.files:
            return self.address
        names = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape"))
        return f"{self.address}#{names.hexdigest()[:12]}"


@dataclass(frozen=True)
class Source:
    """All shards, sorted by name; `folders`: those that were searched; `classes`: folders that become `cls`."""

    shards: tuple[Shard, ...]
    folders: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def find(source: str | Sequence[str], *, pictures_a_shard: int = PICTURES_A_SHARD) -> Source:
    """The shards that `source` stands for.

    >>> find("/data/train-{000000..000007}.tar").shards[0].name           # doctest: +SKIP
    'train-000000.tar'

    A brace pattern, a glob, a folder of shards or of pictures (in folders by class, as torchvision's ImageFolder),
    or several of these; each a path or an fsspec address (s3://, gs://, hf://, file://). Names are those below the
    folder, or below the folder that all shards have in common. Raises FileNotFoundError, and InvalidInput for what
    is no source.
    """
    given = [address for one in ([source] if isinstance(source, str) else source) for address in expanded(one)]
    shards: list[Shard] = []
    tars: dict[str, int] = {}
    folders = []
    for fs, path, info in Threads(LOOKED_AT_ONCE, "look").map(looked_at, given):
        if info["type"] != "directory":
            tars[fs.unstrip_protocol(path)] = info.get("size") or 0
            continue
        found = listing(fs, path)
        inside = {p: size for p, size in found.items() if p.lower().endswith(TARS)}
        if not inside:
            if len(given) > 1:
                raise InvalidInput("source", path, "a folder with shards, beside other sources")
            return pictures(fs, path, found, pictures_a_shard)
        folders.append(fs.unstrip_protocol(path))
        for p, size in inside.items():
            below = p.removeprefix(path.rstrip("/") + "/")
            shards.append(Shard(output_name(below), fs.unstrip_protocol(p), size))
    shards += named(tars)
    twice = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if twice:
        raise InvalidInput("source", twice[:5], "shards of different names: each gives one of the same name")
    return Source(tuple(sorted(shards, key=lambda shard: shard.name)), tuple(folders))


def looked_at(address: str) -> tuple[Any, str, dict[str, Any]]:
    """File system, path and what the storage says of it. Raises FileNotFoundError."""
    fs, path = opened(address)
    try:
        return fs, path, fs.info(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{address}: no such shard or folder") from None


@contextmanager
def reached(address: str | Sequence[str]) -> Iterator[None]:
    """Raises OSError with the address for what a storage says without it: no credentials, no such bucket."""
    try:
        yield
    except Exception as error:
        of_storage = isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in OWN
        said = isinstance(error, OSError) and "://" in str(error)
        if not of_storage or said or "://" not in str(address):
            raise
        raise OSError(f"{short(address)}: {type(error).__name__}: {error}") from error


def expanded(pattern: str) -> list[str]:
    """Addresses of a brace pattern and of globs in it."""
    try:
        addresses = list(braceexpand(pattern)) if "{" in pattern and not os.path.exists(pattern) else [pattern]
    except ValueError as error:  # UnbalancedBracesError
        raise InvalidInput("source", pattern, "braces in pairs, as in train-{000000..000007}.tar") from error
    found = []
    for address in addresses:
        fs, path = opened(address)
        if any(c in path for c in "*?[") and not fs.exists(path):
            matches = [fs.unstrip_protocol(p) for p in sorted(fs.glob(path))]
            if not matches:
                raise FileNotFoundError(f"{address}: nothing matches")
            found += matches
        else:
            found.append(address)
    return found


def of_objects(address: str) -> bool:
    """Whether it is in a store of objects, which has no folders."""
    return address.partition("://")[0] in BUCKETS


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises InvalidInput where its package is missing."""
    try:
        # no cache: other processes write too, and what it says may be old
        options = {"use_listings_cache": False} if of_objects(address) else {}
        fs, path = fsspec.core.url_to_fs(address, **options)
        if isinstance(fs, LocalFileSystem):
            path = os.path.realpath(path)  # one name for one file
    except ImportError as error:
        raise InvalidInput("address", address, f"an address whose package is installed ({error})") from error
    except ValueError as error:
        raise InvalidInput("address", address, f"a path or an fsspec address ({error})") from error
    return fs, path


def file_sha256(fs: Any, path: str) -> str:
    """Of a file's content. Raises OSError."""
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(fs: Any, folder: str) -> dict[str, int]:
    """Files below a folder with their bytes, sorted; what begins with a dot is left out, links are followed."""
    root = folder.rstrip("/") + "/"
    if isinstance(fs, LocalFileSystem):
        walked = (
            os.path.join(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names
        )
        found = {path: os.stat(path).st_size for path in walked if os.path.isfile(path)}
    else:
        found = {path: info.get("size") or 0 for path, info in fs.find(folder, detail=True).items()}
    return {
        path: size
        for path, size in sorted(found.items())
        if not any(part.startswith(".") for part in path.removeprefix(root).split("/"))
    }


def named(tars: dict[str, int]) -> list[Shard]:
    """Shards with the names that they have below their common folder."""
    folders = [address.split("/")[:-1] for address in tars]
    common = os.path.commonprefix(folders)  # noqa: RUF071 - of lists: whole names
    return [
        Shard(output_name("/".join(address.split("/")[len(common) :])), address, nbytes)
        for address, nbytes in tars.items()
    ]


def output_name(name: str) -> str:
    """That of the output shard, ending in .tar."""
    suffix = next(s for s in (*TARS[1:], *TARS[:1], "") if name.lower().endswith(s))
    return name[: len(name) - len(suffix)] + ".tar"


def pictures(fs: Any, folder: str, found: dict[str, int], number: int) -> Source:
    """A folder of pictures, cut into shards of `number`; its folders, where it has some, are the classes."""
    if number < 1:
        raise InvalidInput("pictures_a_shard", number, "1 or more")
    root = folder.rstrip("/") + "/"
    files = {path.removeprefix(root): size for path, size in found.items() if path.lower().endswith(SUFFIXES)}
    if not files:
        raise InvalidInput("source", folder, f"a folder that holds shards or pictures ({', '.join(SUFFIXES)})")
    classes = tuple(sorted({name.split("/")[0] for name in files if "/" in name}))
    if classes and any("/" not in name for name in files):
        loose = next(name for name in files if "/" not in name)
        raise InvalidInput("source", loose, f"in a folder of its class, as others are ({classes[0]}/...)")
    names = list(files)
    shards = []
    for i, start in enumerate(range(0, len(names), number)):
        part = tuple(names[start : start + number])
        nbytes = sum(files[name] for name in part)
        shards.append(Shard(f"{i:06d}.tar", fs.unstrip_protocol(folder), nbytes, part))
    return Source(tuple(shards), (fs.unstrip_protocol(folder),), classes or None)
