"""Finds the source shards that SRC stands for: a brace pattern, a glob, a folder or an address."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from dat_client.dataset_format.folders import LoosePictures, pictures_of
from dat_client.dataset_format.left_out import NAMED, LeftOut, Row
from dat_client.dataset_format.naming import TAR_SUFFIXES, expand, output_name, suffix_reason
from dat_workers.errors import InvalidInput
from dat_workers.sources.addresses import open_address
from dat_workers.sources.folders import PICTURES_A_SHARD, Shard, divide_pictures, list_address
from dat_workers.sources.kinds import PICTURE, advice_by_name, refuse_command
from dat_workers.system.threads import DaemonThreads

LOOKUP_THREADS = 16  # each shard needs one or two requests to a storage that may be remote

#: One or more paths, brace patterns, globs or fsspec addresses.
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Source:
    """All shards that some paths stand for.

    Attributes:
        shards: sorted by name if they are labelled, else in the order of the paths.
        folders: the addresses of the folders that were searched.
        classes: the names of the class folders, whose positions become `cls`; None without such folders.
        problems: (name, reason) of what should have been read and cannot be.
        left_out: what was passed over.
    """

    shards: tuple[Shard, ...]
    folders: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    problems: tuple[tuple[str, str], ...] = ()
    left_out: tuple[Row, ...] = ()


def find(
    source: Paths,
    *,
    pictures_a_shard: int = PICTURES_A_SHARD,
    labelled: bool = True,
    only_pictures: bool = False,
    skip: bool = False,
) -> Source:
    """Returns the shards that `source` stands for.

    >>> find("/data/train-{000000..000007}.tar").shards[0].name           # doctest: +SKIP
    'train-000000.tar'

    `source` is a brace pattern, a glob, a folder of shards or of pictures (in folders by class, as torchvision's
    ImageFolder), or several of these; each is a path or an fsspec address (s3://, gs://, hf://, file://). The name
    of a shard is its path below the searched folder, or below the common folder of all shards.

    Args:
        pictures_a_shard: the number of pictures of a folder that make a shard.
        labelled: True if the classes count. Then an empty class folder is a problem, and a folder of pictures must
            be the only source. Otherwise several folders and single pictures may be named.
        only_pictures: True if shards are not wanted: each file is then taken for a picture.
        skip: True to return problems in the result instead of raising them.

    Raises FileNotFoundError if nothing matches, and InvalidInput for a source that is none of these, for a folder
    that holds both shards and pictures, for a link to a folder that contains it, and for problems.
    """
    if pictures_a_shard < 1:
        raise InvalidInput("pictures_a_shard", pictures_a_shard, "1 or more")
    paths = [source] if isinstance(source, str | Path) else source
    addresses = [address for path in paths for address in matches(str(path))]
    found = _Found(pictures_a_shard, labelled, only_pictures, len(addresses))
    for fs, path, info in DaemonThreads(LOOKUP_THREADS, "look").map(look_up, addresses):
        found.add(fs, path, info)
    return found.checked(skip)


@dataclass
class _Found:
    """Collects the shards of several addresses."""

    pictures_a_shard: int
    labelled: bool
    only_pictures: bool
    number: int  # of addresses
    shards: list[Shard] = field(default_factory=list)
    tars: dict[str, int] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    classes: tuple[str, ...] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    addresses: set[str] = field(default_factory=set)

    def add(self, fs: Any, path: str, info: dict[str, Any]) -> None:
        """Adds the shards of one address, of which `info` has the type and the size."""
        address = fs.unstrip_protocol(path)
        self._refuse_second(address)
        if info["type"] == "directory":
            self._add_folder(fs, path, address)
            return
        if info["type"] != "file":
            message = f"{path} is a FIFO, a socket or a device, but must be a file or a folder"
            raise InvalidInput("source", path, "a file or a folder", message)
        advice = advice_by_name(path)
        size = info.get("size") or 0
        if self.only_pictures or (advice == PICTURE and not self.labelled):
            folder, _, name = path.rpartition("/")
            self.shards.append(Shard(output_name(name), fs.unstrip_protocol(folder or "/"), size, (name,)))
        elif advice:
            raise InvalidInput("source", path, "", f"{path} is {advice}")
        else:
            self.tars[address] = size

    def _add_folder(self, fs: Any, path: str, address: str) -> None:
        root = path.rstrip("/")
        listing = list_address(fs, path)
        self.left_out.update(below(root, listing.left_out.rows))
        self.folders.append(address)
        tars = [name for name in listing.files if name.lower().endswith(TAR_SUFFIXES)]
        if not tars or self.only_pictures:
            if self.labelled and self.number > 1:
                raise InvalidInput("source", path, "folders with shards, if there are several sources")
            try:
                pictures = pictures_of(listing, labelled=self.labelled)
            except LoosePictures as error:
                message = f"{root}: {error}"
                raise InvalidInput("source", root, "pictures in folders of their class", message) from error
            self.left_out.update(below(root, pictures.left_out.rows))
            self.shards += divide_pictures(address, root, listing, pictures, self.pictures_a_shard)
            self.classes = pictures.classes
            problems = pictures.problems
        else:
            refuse_mixture(root, tars, [name for name in listing.files if not suffix_reason(name)])
            for name in listing.files:
                if reason := suffix_reason(name, TAR_SUFFIXES):
                    self.left_out.add(reason, f"{root}/{name}")
            named = [Shard(output_name(t), fs.unstrip_protocol(f"{root}/{t}"), listing.files[t]) for t in tars]
            for shard in named:
                self._refuse_second(shard.address)
            self.shards += [named[0].with_problems(listing.problems), *named[1:]]
            problems = listing.problems
        self.problems += [(f"{root}/{name}", reason) for name, reason in problems.items()]

    def _refuse_second(self, address: str) -> None:
        if address in self.addresses:
            raise InvalidInput("source", address, "", f"{address} is named twice; name each source once")
        self.addresses.add(address)

    def checked(self, skip: bool) -> Source:
        """Returns the whole source, or raises InvalidInput for names that occur twice and for problems."""
        shards = [*self.shards, *named_below_common_folder(self.tars)]
        if self.labelled:
            shards.sort(key=lambda shard: shard.name)
            repeated = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
            if repeated:
                raise InvalidInput(
                    "source", repeated[:5], "shards of different names: each output shard has its source's name"
                )
        if self.problems and not skip:
            raise unreadable(self.problems)
        return Source(tuple(shards), tuple(self.folders), self.classes, tuple(self.problems), self.left_out.rows)


def below(root: str, rows: Sequence[Row]) -> list[Row]:
    """Returns rows of a folder's LeftOut with whole paths."""
    return [(reason, count, tuple(f"{root}/{name}" for name in names)) for reason, count, names in rows]


def refuse_mixture(root: str, tars: Sequence[str], pictures: Sequence[str]) -> None:
    """Raises InvalidInput if a folder holds both shards and pictures."""
    if not tars or not pictures:
        return
    suffix = next(suffix for suffix in TAR_SUFFIXES if tars[0].lower().endswith(suffix))
    pattern = "/".join([root, *(["**"] if "/" in tars[0] else []), f"*{suffix}"])
    raise InvalidInput(
        "source", root, "",
        f"{root} holds both pictures ({pictures[0]}) and shards ({tars[0]}), so it is not clear which are meant. "
        f"For the shards, give a pattern such as '{pattern}'; for the pictures, give a folder without shards, or "
        f"move {tars[0]} out of it",
    )  # fmt: skip


def unreadable(problems: Sequence[tuple[str, str]]) -> InvalidInput:
    """Returns the error that names the first 20 problems and says how to go on."""
    named = "; ".join(f"{name} ({reason})" for name, reason in problems[:NAMED])
    more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return InvalidInput(
        "source", problems[0][0], "",
        f"the source has {len(problems)} names that cannot be read: {named}{more}. Mend or remove them, or leave "
        "them out with --on-error skip (skip=True), which lists them",
    )  # fmt: skip


def matches(pattern: str) -> list[str]:
    """Returns the addresses that a brace pattern or a glob stands for. Raises FileNotFoundError if none match."""
    refuse_command(pattern)
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
        if isinstance(fs, LocalFileSystem) and os.path.islink(path):
            raise FileNotFoundError(f"{address}: a link to {os.readlink(path)}, which does not exist") from None
        raise FileNotFoundError(f"{address}: no such shard or folder") from None


def named_below_common_folder(tars: dict[str, int]) -> list[Shard]:
    """Returns the shards of `tars` (address: size), named by their paths below the addresses' common folder."""
    folders = [address.split("/")[:-1] for address in tars]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 - of lists, so it compares whole names
    return [
        Shard(output_name("/".join(address.split("/")[depth:])), address, nbytes)
        for address, nbytes in tars.items()
    ]
