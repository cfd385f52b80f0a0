"""Finds the source shards that SRC stands for: a brace pattern, a glob, a folder or an address."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from dat_client.dataset_format.naming import expand, output_name
from dat_client.wire.vocabulary import PICTURE_SUFFIXES, TAR_SUFFIXES
from dat_workers.errors import InvalidInput
from dat_workers.sources.addresses import open_address
from dat_workers.system.threads import DaemonThreads

PICTURES_A_SHARD = 1000
LOOKUP_THREADS = 16  # each shard needs one or two requests to a storage that may be remote


@dataclass(frozen=True)
class Shard:
    """One source shard: the `address` of a tar, or `files` below `address`, a folder of pictures.

    name: the path of the output shard, relative to DST. nbytes: the size of the source, or 0 if its storage does
    not report sizes.
    """

    name: str
    address: str
    nbytes: int
    files: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """The source as the manifest records it: the address and, for pictures, a digest of their names."""
        if not self.files:
            return self.address
        names = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape"))
        return f"{self.address}#{names.hexdigest()[:12]}"


@dataclass(frozen=True)
class Source:
    """All shards, sorted by name; `folders` were searched for them, and `classes` are folders that become `cls`."""

    shards: tuple[Shard, ...]
    folders: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def find(source: str | Sequence[str], *, pictures_a_shard: int = PICTURES_A_SHARD) -> Source:
    """Returns the shards that `source` stands for.

    >>> find("/data/train-{000000..000007}.tar").shards[0].name           # doctest: +SKIP
    'train-000000.tar'

    `source` is a brace pattern, a glob, a folder of shards or of pictures (in folders by class, as torchvision's
    ImageFolder), or several of these; each is a path or an fsspec address (s3://, gs://, hf://, file://). The name
    of a shard is its path below the searched folder, or below the common folder of all shards. Raises
    FileNotFoundError if nothing matches, and InvalidInput for a source that is none of these.
    """
    patterns = [source] if isinstance(source, str) else source
    addresses = [address for pattern in patterns for address in matches(pattern)]
    shards: list[Shard] = []
    tars: dict[str, int] = {}
    folders = []
    for fs, path, info in DaemonThreads(LOOKUP_THREADS, "look").map(look_up, addresses):
        if info["type"] != "directory":
            tars[fs.unstrip_protocol(path)] = info.get("size") or 0
            continue
        files = list_files(fs, path)
        tar_files = {p: size for p, size in files.items() if p.lower().endswith(TAR_SUFFIXES)}
        if not tar_files:
            if len(addresses) > 1:
                raise InvalidInput("source", path, "folders with shards, if there are several sources")
            return source_of_pictures(fs, path, files, pictures_a_shard)
        folders.append(fs.unstrip_protocol(path))
        for p, size in tar_files.items():
            below = p.removeprefix(path.rstrip("/") + "/")
            shards.append(Shard(output_name(below), fs.unstrip_protocol(p), size))
    shards += named_below_common_folder(tars)
    repeated = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if repeated:
        raise InvalidInput(
            "source", repeated[:5], "shards of different names: each output shard has its source's name"
        )
    return Source(tuple(sorted(shards, key=lambda shard: shard.name)), tuple(folders))


def matches(pattern: str) -> list[str]:
    """Returns the addresses that a brace pattern or a glob stands for. Raises FileNotFoundError if none match."""
    found: list[str] = []
    try:
        for address, urls in expand(pattern, open_address):
            if not urls:
                raise FileNotFoundError(f"{address}: nothing matches")
            found += urls
    except InvalidInput:
        raise
    except ValueError as error:  # UnbalancedBracesError
        raise InvalidInput("source", pattern, "braces in pairs, as in train-{000000..000007}.tar") from error
    return found


def look_up(address: str) -> tuple[Any, str, dict[str, Any]]:
    """Returns an address's file system, its path there, and its type and size. Raises FileNotFoundError."""
    fs, path = open_address(address)
    try:
        return fs, path, fs.info(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{address}: no such shard or folder") from None


def list_files(fs: Any, folder: str) -> dict[str, int]:
    """Returns the files below a folder with their sizes in bytes, sorted.

    Files and folders whose name begins with a dot are left out; links are followed.
    """
    root = folder.rstrip("/") + "/"
    if isinstance(fs, LocalFileSystem):
        walked = (
            os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names
        )
        files = {path: os.stat(path).st_size for path in walked if os.path.isfile(path)}
    else:
        files = {path: info.get("size") or 0 for path, info in fs.find(folder, detail=True).items()}
    return {
        path: size
        for path, size in sorted(files.items())
        if not any(part.startswith(".") for part in path.removeprefix(root).split("/"))
    }


def named_below_common_folder(tars: dict[str, int]) -> list[Shard]:
    """Returns the shards of `tars` (address: size), named by their paths below the addresses' common folder."""
    folders = [address.split("/")[:-1] for address in tars]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 - of lists, so it compares whole names
    return [
        Shard(output_name("/".join(address.split("/")[depth:])), address, nbytes)
        for address, nbytes in tars.items()
    ]


def source_of_pictures(fs: Any, folder: str, files: dict[str, int], pictures_a_shard: int) -> Source:
    """Divides a folder of pictures into shards; sub-folders, if there are any, are the classes."""
    if pictures_a_shard < 1:
        raise InvalidInput("pictures_a_shard", pictures_a_shard, "1 or more")
    root = folder.rstrip("/") + "/"
    sizes = {path.removeprefix(root): n for path, n in files.items() if path.lower().endswith(PICTURE_SUFFIXES)}
    if not sizes:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise InvalidInput("source", folder, f"a folder that holds shards or pictures ({suffixes})")
    classes = tuple(sorted({name.split("/")[0] for name in sizes if "/" in name}))
    if classes and any("/" not in name for name in sizes):
        loose = next(name for name in sizes if "/" not in name)
        raise InvalidInput(
            "source", loose, f"pictures in a folder of their class ({classes[0]}/...), like the rest"
        )
    address, names = fs.unstrip_protocol(folder), list(sizes)
    shards = []
    for i, start in enumerate(range(0, len(names), pictures_a_shard)):
        part = tuple(names[start : start + pictures_a_shard])
        shards.append(Shard(f"{i:06d}.tar", address, sum(sizes[name] for name in part), part))
    return Source(tuple(shards), (address,), classes or None)
