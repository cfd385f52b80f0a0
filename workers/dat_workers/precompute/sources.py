"""SRC into shards: what a brace pattern, a folder or an address stands for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from braceexpand import braceexpand

from dat_workers.errors import InvalidInput
from dat_workers.pictures import SUFFIXES

TARS = (".tar", ".tar.gz", ".tgz")
PICTURES_A_SHARD = 1000


@dataclass(frozen=True)
class Shard:
    """One input shard: `address` of a tar, or `files` below `address`, a folder of pictures.

    `name`: that of the output shard, relative to DST. `nbytes`: of the source, 0 where its storage does not say.
    """

    name: str
    address: str
    nbytes: int
    files: tuple[str, ...] = ()


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
    or several of these; each a path or an fsspec address (s3://, gs://, hf://, file://). Names keep what is below
    the folder that all shards have in common. Raises FileNotFoundError, and InvalidInput for what is no source.
    """
    given = [source] if isinstance(source, str) else list(source)
    tars: dict[str, int] = {}
    folders = []
    for pattern in given:
        for address in expanded(pattern):
            fs, path = opened(address)
            if fs.isdir(path):
                found = listing(fs, path)
                inside = {p: size for p, size in found.items() if p.lower().endswith(TARS)}
                if not inside:
                    if len(given) > 1:
                        raise InvalidInput("source", address, "a folder with shards, beside other sources")
                    return pictures(fs, path, found, pictures_a_shard)
                folders.append(fs.unstrip_protocol(path))
                tars |= {fs.unstrip_protocol(p): size for p, size in inside.items()}
            elif fs.isfile(path):
                tars[fs.unstrip_protocol(path)] = fs.size(path) or 0
            else:
                raise FileNotFoundError(f"{address}: no such shard or folder")
    return Source(tuple(sorted(named(tars), key=lambda shard: shard.name)), tuple(folders))


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


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises InvalidInput where its package is missing."""
    try:
        fs, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise InvalidInput("address", address, f"an address whose package is installed ({error})") from error
    except ValueError as error:
        raise InvalidInput("address", address, f"a path or an fsspec address ({error})") from error
    return fs, path


def listing(fs: Any, folder: str) -> dict[str, int]:
    """Files below a folder with their bytes, sorted; what begins with a dot is left out."""
    root = folder.rstrip("/") + "/"
    found = fs.find(folder, detail=True)
    return {
        path: info.get("size") or 0
        for path, info in sorted(found.items())
        if not any(part.startswith(".") for part in path.removeprefix(root).split("/"))
    }


def named(tars: dict[str, int]) -> list[Shard]:
    """Shards with the names that they have below their common folder, ending in .tar."""
    if not tars:
        return []
    folders = [address.split("/")[:-1] for address in tars]
    common = os.path.commonprefix(folders)  # noqa: RUF071 - of lists: whole names
    shards = []
    for address, nbytes in tars.items():
        name = "/".join(address.split("/")[len(common) :])
        suffix = next(s for s in (*TARS[1:], *TARS[:1], "") if name.lower().endswith(s))
        shards.append(Shard(name[: len(name) - len(suffix)] + ".tar", address, nbytes))
    twice = [name for name, number in Counter(shard.name for shard in shards).items() if number > 1]
    if twice:
        raise InvalidInput("source", twice[:5], "shards of different names: each gives one of the same name")
    return shards


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
